"""A lock on a local folder, held by one process at a time. The kernel releases it when its holder dies."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.locks.holder import Holder, this_process
from radlads.tasks.contracts.parsing.files import explain_os_error

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2


class FolderInUse(UserError):  # noqa: N818
    """Another process works in the folder."""


@contextmanager
def hold_folder(
    folder: Path, name: str, *, what: str, wait_seconds: float = 0.0, look: Callable[[], None] = lambda: None
) -> Iterator[bool]:
    """Lock a folder against other processes and threads; yields whether it had to wait.

    name: of the lock file in the folder; the file stays and names the last holder. what: the folder's use, for the
    message. look: called while waiting; may raise. Raises FolderInUse, which names the holder, after wait_seconds;
    UserError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{explain_os_error(error, f'cannot work in {folder}')} (--work sets the folder)") from None
    try:
        waited = _lock(handle, what, wait_seconds, look)
        os.ftruncate(handle, 0)
        os.pwrite(handle, this_process(folder).model_dump_json().encode(), 0)
        yield waited
    finally:
        os.close(handle)


def _lock(handle: int, what: str, wait_seconds: float, look: Callable[[], None]) -> bool:
    end, waited = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(handle)
            if time.monotonic() >= end:
                raise FolderInUse(
                    f"{what} is in use by {holder or 'another process'}: wait for it or end it"
                    f"{f' (kill {holder.pid})' if holder else ''}, or use a folder of its own with --work"
                ) from None
            if not waited:
                _log.warning("%s is in use by %s: waiting", what, holder or "another process")
            waited = True
            look()
            time.sleep(_POLL_SECONDS)
        else:
            return waited


def _read(handle: int) -> Holder | None:
    try:
        return Holder.model_validate_json(os.pread(handle, 1 << 16, 0))
    except ValidationError:  # it is just being written
        return None
