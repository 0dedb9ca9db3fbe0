"""The interface of a launcher, which starts a job, follows it to its end, and reports the available devices.

A launcher is one file beside this one and one line in registry.py; a recipe chooses it with `resources.launcher`. The
job reads its inputs from the store and commits its product there, so it needs nothing but its JobSpec.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from radlads.tasks.contracts.errors import UserError

if TYPE_CHECKING:  # the command line reads this module before it knows what is asked
    from radlads.tasks.contracts.job import JobResources, JobSpec
    from radlads.tasks.contracts.recipe.recipe import Resources
    from radlads.tasks.contracts.store.base import Store
    from radlads.tasks.launchers.progress import Progress


class JobFailed(UserError):  # noqa: N818 - named after how the job ended, as its siblings
    """The job ended with an error that a retry cannot fix."""


class JobCrashed(Exception):  # noqa: N818
    """The job crashed; its work up to the last checkpoint is kept, and a retry may succeed."""


class JobPreempted(JobCrashed):
    """The job was stopped on request and ended cleanly."""


class Launcher(Protocol):
    """Where jobs run. One instance serves a whole pipeline, and several jobs at a time."""

    def run(
        self, spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
    ) -> None:
        """Run a job to its end. It returns if the job completed; the caller checks in the store that the product
        exists.

        spec.scratch: the job's folder. When this returns or raises, the folder holds the job's log.txt, exit.json and
        metrics.jsonl on the machine of the caller. on_progress: called about once a second while there is new progress;
        an exception from it stops the job. grace_seconds: time for a stopped job to save a checkpoint. Raises JobFailed
        (final), JobPreempted or JobCrashed (can be retried), RunStopped.
        """

    def resources(self, requested: Resources) -> JobResources:
        """Resolve a recipe's `resources` for this launcher's machines. Raises UserError if they exceed them."""

    def check(self, store: Store, work: Path) -> None:
        """Called once, before a run's first job: whether jobs can run, on machines that see the store. work: the flow's
        work folder. Raises UserError, one line."""

    def hold_devices(self, resources: JobResources, purpose: str) -> AbstractContextManager[None]:
        """Context for `run`: waits until no other job uses the job's devices and reserves them. A launcher whose
        scheduler does that returns a null context. purpose: shown to jobs that wait.
        """
