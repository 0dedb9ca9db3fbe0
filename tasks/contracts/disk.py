"""Messages of one line about full disks and unwritable folders: the place, the sizes, the remedy."""

from __future__ import annotations

import os
import shutil
from itertools import islice
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.files import FULL_DISK, MENDABLE, explain_os_error

_FULL_TEXTS = [os.strerror(number) for number in FULL_DISK]
_MOST_ENTRIES = 20_000
_CURE = "free some space, or choose other folders with --work and --store"


class DiskFull(UserError):  # noqa: N818 - named after the condition, as its siblings
    """Not enough disk space for a write. The message names the place and the sizes."""


def need_space(folder: Path, size: int, what: str) -> None:
    """Raises DiskFull, before anything is written, where `size` bytes do not fit under `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DiskFull(f"the disk is full: {what} needs {_gib(size)}, {folder} has {_gib(free)} free; {_CURE}")


def explain_disk(error: BaseException, place: Path) -> UserError | None:
    """The message for an error caused by a full disk or an unwritable folder; None for any other error. place: where
    the program was writing, for errors that do not name a path. Native libraries report the system's text inside errors
    of their own.
    """
    cause: BaseException | None = error
    while cause is not None:
        number, named = _number_and_path(cause)
        if number in FULL_DISK or any(text in str(cause) for text in _FULL_TEXTS):
            return DiskFull(describe_full(named or place))
        if cause is error and isinstance(cause, OSError) and number in MENDABLE and named is not None:
            return UserError(f"{explain_os_error(cause, str(named))} (--work and --store set the folders)")
        cause = cause.__cause__ or cause.__context__
    return None


def _number_and_path(error: BaseException) -> tuple[int | None, Path | None]:
    if not isinstance(error, OSError):
        return None, None
    named = isinstance(error.filename, str | bytes | os.PathLike)
    return error.errno, Path(os.fsdecode(error.filename)) if named else None


def describe_full(place: Path) -> str:
    """One line about a full disk: its space, and the size of the files in `place`."""
    folder = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(folder)
    own = _size(folder)
    own_files = "" if own is None else f", the files in {folder} take {_gib(own)}"
    return f"the disk is full at {place}: {_gib(usage.free)} of {_gib(usage.total)} are free{own_files}; {_CURE}"


def _size(folder: Path) -> int | None:
    """Total bytes of the files below a folder; None if there are too many to count, or some vanish during the count."""
    entries = list(islice(folder.rglob("*"), _MOST_ENTRIES + 1))
    if len(entries) > _MOST_ENTRIES:
        return None
    try:
        return sum(path.stat().st_size for path in entries if path.is_file() and not path.is_symlink())
    except OSError:
        return None


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 27 else f"{size / (1 << 20):.1f} MiB"
