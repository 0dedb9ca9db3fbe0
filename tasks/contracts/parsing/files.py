"""The file system's errors in one line of ours, where files and folders of a user are entered."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.document import one_line

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
"""What the operating system says where there is no room."""
_CURES = {
    errno.ENOSPC: "no space is left; free some, or choose another place",
    errno.EDQUOT: "the quota is used up; free some space, or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; choose another place, or change its permissions",
    errno.EPERM: "not permitted; choose another place, or change its permissions",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder, not a file",
    errno.ELOOP: "its links go in a circle",
}
MENDABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, *FULL_DISK}
"""Refusals that another place, permissions or more room would mend."""


@contextmanager
def file_errors(where: str) -> Iterator[None]:
    """Raises UserError, one line, for what the operating system refuses inside the block. where: as the user knows the
    place."""
    try:
        yield
    except OSError as error:
        raise UserError(explain_os_error(error, where)) from None
    except (ValueError, RuntimeError, NotImplementedError) as error:  # NUL in a path, ~nobody, a pattern of stars
        raise UserError(f"{where}: not a usable path: {one_line(str(error), 200)}") from None


def private_folder(path: Path) -> Path:
    """A folder of our own naming that only this user can enter, made if it is not there. Raises UserError where it is
    somebody else's."""
    with file_errors(str(path)):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
        if status.st_uid != os.geteuid():
            raise UserError(f"{path} belongs to another user (uid {status.st_uid}); choose a folder of your own")
        if status.st_mode & 0o077:
            path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only this user can read; a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with file_errors(str(path)):
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.replace(path)


def explain_os_error(error: OSError, where: str | None = None) -> str:
    """What was refused, where, and what to do, in one line."""
    place = where or one_line(str(error.filename or "the disk"), 200)
    return f"{place}: {_CURES.get(error.errno or 0, one_line(error.strerror or str(error), 200))}"
