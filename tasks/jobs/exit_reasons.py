"""How a job ends: reasons, exit codes, and exit.json, from which the control plane reads both."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.disk import DiskFull, explain_disk
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import ExitReason
from radlads.tasks.contracts.locks.scratch_lock import FolderInUse, hold_folder
from radlads.tasks.contracts.parsing.credentials import hide

logger = logging.getLogger("radlads")

_FOLDER_SECONDS = 60.0


_RESERVE_BYTES = 64 << 10
EXIT_CODES: dict[ExitReason, int] = {
    "done": 0,
    "crash": 1,
    "config": 2,
    "out-of-memory": 3,
    "nonfinite": 4,
    "disk-full": 5,
    "watch": 6,
    "preempted": 75,
}


class NonFiniteError(Exception):
    """A loss or a gradient is not finite; no parameter was updated with it."""


class StoppedByWatch(Exception):  # noqa: N818 - named after how the job ended
    """A detector of `watch` ended the job, after a checkpoint."""


class Preempted(BaseException):
    """The job was asked to stop. A BaseException, so that handlers of ordinary errors do not catch it."""


def explain(error: BaseException, scratch: Path) -> tuple[ExitReason, str]:
    """The reason and a one-line message for an exception that ended a job with the folder `scratch`."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__
    if isinstance(error, UserError):
        return "disk-full" if isinstance(error, DiskFull) else "config", str(error)
    if isinstance(error, NonFiniteError):
        return "nonfinite", str(error)
    if isinstance(error, StoppedByWatch):
        return "watch", str(error)
    if isinstance(error, Preempted):
        return "preempted", str(error) or "stopped on request"
    if isinstance(error, KeyboardInterrupt):
        return "preempted", "stopped from the keyboard"
    if _is_out_of_memory(error):
        advice = "use a smaller micro_batch (evaluate, needle: batch), or gradient_checkpointing; no step is lost by it"
        return "out-of-memory", f"{line}; {advice}"
    disk = explain_disk(error, scratch)
    if disk is not None:
        return "disk-full" if isinstance(disk, DiskFull) else "config", str(disk)
    return "crash", line


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def keep_folder(scratch: Path, local_rank: int) -> Iterator[bool]:
    """Lock the job's folder, by one rank of a machine; yields whether the lock was obtained.

    Processes of an earlier attempt get time to end. If they do not, this attempt exits without writing exit.json, which
    belongs to the earlier one.
    """
    if local_rank != 0:
        yield True
        return
    with ExitStack() as stack:
        what = f"the job's folder {scratch}"
        try:
            stack.enter_context(hold_folder(scratch, "job.lock", what=what, wait_seconds=_FOLDER_SECONDS))
        except FolderInUse as error:
            logger.error("%s", error)
            yield False
        else:
            yield True


def prepare_ending(scratch: Path, rank: int) -> None:
    """Remove the exit record of an earlier attempt, and reserve disk space for this one's, in case the disk is full by
    then."""
    _own_file(scratch, rank).unlink(missing_ok=True)
    with _reserve(scratch, rank).open("wb") as file:
        file.write(os.urandom(_RESERVE_BYTES))  # incompressible, so that a file system stores it in full
        file.flush()
        os.fsync(file.fileno())


def write_ending(scratch: Path, rank: int, reason: ExitReason, message: str) -> None:
    """Write how a rank ended. The first rank that fails writes exit.json, because its error is the cause."""
    record = {"reason": reason, "message": hide(message), "rank": rank}
    try:
        _reserve(scratch, rank).unlink(missing_ok=True)
        if rank > 0:
            write_json(_own_file(scratch, rank), record)
        if rank == 0 or reason not in ("done", "preempted"):
            write_json(scratch / "exit.json", record, keep_existing=True)
    except OSError as error:  # the exit code carries the reason; the log gets the message if it can be written
        logger.error("%s: %s; this ending is not in exit.json: %s", reason, message, error)


def _reserve(scratch: Path, rank: int) -> Path:
    return scratch / f".reserve-{rank}"


def _own_file(scratch: Path, rank: int) -> Path:
    return scratch / ("exit.json" if rank == 0 else f"exit-rank{rank}.json")


def write_json(path: Path, value: Any, *, keep_existing: bool = False) -> None:
    """Write a JSON file atomically: a reader sees the old one or the new one. keep_existing: the first writer wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        if not keep_existing or not path.exists():
            os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
