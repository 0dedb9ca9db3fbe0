"""What a launcher does: it starts a job wherever jobs run, follows it to its end, and says what there is to run on.

A launcher is one file beside this one and one line in registry.py; a recipe chooses it with `resources.launcher`. The
job itself reads its inputs from the store and commits its product there, so nothing but the JobSpec has to reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.launchers.progress import Progress


class JobFailed(UserError):  # noqa: N818 - named after how the job ended, as its siblings
    """The job ended for a reason that trying again cannot mend."""


class JobCrashed(Exception):  # noqa: N818
    """The job died; its work up to the last checkpoint is safe, and trying again may help."""


class JobPreempted(JobCrashed):
    """The job was asked to stop and did so in order."""


class Launcher(Protocol):
    """Where jobs run. One instance serves a whole pipeline, and several jobs at a time."""

    def run(
        self, spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
    ) -> None:
        """Run a job to its end. Returning means that it ended well; whether there is a product is for the caller to
        check in the store.

        spec.scratch: the job's folder. When this returns or raises, it holds what the job left for people (log.txt,
        exit.json, metrics.jsonl) on the machine of the caller. on_progress: called about once a second while there is
        something new; what it raises stops the job. grace_seconds: what a job that is stopped gets to save a
        checkpoint. Raises JobFailed (final), JobPreempted or JobCrashed (may be tried again), RunStopped.
        """

    def resources(self, asked: Resources) -> JobResources:
        """What a recipe's `resources` come to where this launcher runs jobs. UserError for more than that."""

    def hold_devices(self, resources: JobResources, purpose: str) -> AbstractContextManager[None]:
        """Held around `run`: waits until the job's devices are free of other jobs and keeps them so.

        A launcher whose scheduler does that returns a null context. purpose: what those who wait are told.
        """
