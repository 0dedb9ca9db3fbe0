"""Waiting of ranks for one rank that works alone: fetching an input, tokenizing, committing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from radlads.tasks.jobs.exit_reasons import write_json
from radlads.tasks.jobs.ownership import is_committed

if TYPE_CHECKING:
    from radlads.tasks.jobs.common import Job

_COMMITTED = "committed.json"
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0
# Longer than the upload of the largest model, which reports no progress.
_STALL_SECONDS = 6 * 3600.0


def wait_for(marker: Path, scratch: Path) -> None:
    """Wait for a file that the working rank writes when it is done, however long that takes.

    Not at a collective, which has a time limit of its own. The launcher detects a dead rank. Raises
    TimeoutError when the job reports no progress for `_STALL_SECONDS`.
    """
    began = time.time()
    progress = scratch / "progress.json"
    while not marker.exists():
        seen = max(began, progress.stat().st_mtime if progress.is_file() else began)
        if time.time() - seen > _STALL_SECONDS:
            raise TimeoutError(f"waited for {marker.name}, but the rank that works alone reports no progress")
        time.sleep(_POLL_SECONDS)


def forget_commit(scratch: Path, local_rank: int) -> None:
    """Remove the commit marker of an earlier attempt. Called before the ranks join, so that none sees the old one."""
    if local_rank == 0:
        (scratch / _COMMITTED).unlink(missing_ok=True)


def announce_commit(scratch: Path) -> None:
    """Write the marker that the product is committed."""
    write_json(scratch / _COMMITTED, {})


def wait_for_commit(job: Job) -> None:
    """Wait until the product is committed. The first rank of a host that is not the first looks in the store, and then
    announces it to the other ranks of its host. The launcher detects a first rank that dies."""
    if job.rank > 0 and job.local_rank == 0:
        while not is_committed(job.store, job.output_prefix, job.spec.digest):
            time.sleep(_LOOK_SECONDS)
        announce_commit(job.scratch)
    wait_for(job.scratch / _COMMITTED, job.scratch)
