"""Reports file-system errors as one-line UserErrors, and writes private files and folders."""

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
    errno.ENOSPC: "no space left on the device; free some, or choose another location",
    errno.EDQUOT: "the quota is exceeded; free some space, or choose another location",
    errno.EROFS: "the file system is read-only; choose another location",
    errno.EACCES: "permission denied; choose another location, or change its permissions",
    errno.EPERM: "not permitted; choose another location, or change its permissions",
    errno.EEXIST: "a file exists where a folder is needed",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "this is a folder, not a file",
    errno.ELOOP: "its symbolic links form a loop",
}
MENDABLE = set(_CURES) - {errno.EEXIST, errno.EISDIR}
"""Refusals that another place, permissions or more room would mend; the two left out may be a bug of the caller's."""


@contextmanager
def file_errors(where: str) -> Iterator[None]:
    """Turn errors of the operating system inside the block into a one-line UserError. where: the path as the user
    wrote it."""
    try:
        yield
    except OSError as error:
        raise UserError(explain_os_error(error, where)) from None
    except (ValueError, RuntimeError, NotImplementedError) as error:  # NUL in a path, ~nobody, a pattern of stars
        raise UserError(f"{where}: not a usable path: {one_line(str(error), 200)}") from None


def private_folder(path: Path) -> Path:
    """Create a folder that only this user can access, or restrict an existing one. Raises UserError if another user
    owns it."""
    with file_errors(str(path)):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
        if status.st_uid != os.geteuid():
            raise UserError(f"{path} belongs to another user (uid {status.st_uid}); choose your own folder")
        if status.st_mode & 0o077:
            path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically by one that only this user can read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with file_errors(str(path)):
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        temporary.replace(path)


def explain_os_error(error: OSError, where: str | None = None) -> str:
    """One line with the location, the error and the remedy."""
    location = where or one_line(str(error.filename or "the disk"), 200)
    return f"{location}: {_CURES.get(error.errno or 0, one_line(error.strerror or str(error), 200))}"
