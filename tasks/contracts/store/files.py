"""Files on this machine: their hashes, and a folder that holds exactly what a product lists."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

TEMPORARY = ".tmp-"
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of a file until one of the two is written to
_PARALLEL_FILES = 8
_Item = TypeVar("_Item")
_Out = TypeVar("_Out")


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 (hex) of a file."""
    digest = hashlib.sha256()
    size = 0
    for block in read_blocks(path):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def read_blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """The file's content in blocks."""
    with path.open("rb") as stream:
        while block := stream.read(size):
            yield block


class VerifiedFiles:
    """Hashes of local files already read in this process; a changed size, time or inode asks for reading again."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, int], str] = {}

    def sha256(self, path: Path) -> str:
        """sha256 (hex) of the file. Raises FileNotFoundError."""
        status = os.stat(path)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in self._known:
            self._known[key] = hash_file(path)[1]
        return self._known[key]


def clear_unlisted(folder: Path, listed: Collection[str]) -> None:
    """Remove from a folder whatever is not at one of the listed paths, and links to folders wherever they stand."""
    wanted = set(listed)
    for place, folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            if path.relative_to(folder).as_posix() not in wanted:
                path.unlink()
        for name in folders:
            path = Path(place, name)
            if path.is_symlink():
                path.unlink()
            elif path.relative_to(folder).as_posix() in wanted:
                shutil.rmtree(path)
            else:
                with contextlib.suppress(OSError):  # it holds what is listed
                    path.rmdir()


def place_file(source: Path, target: Path, *, symbolic: bool = True) -> None:
    """Have the content of `source` at `target` without copying it, where the filesystem can: shared blocks, a hard
    link, a symbolic link unless that is unwanted; a copy where it can do none of these."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    ways: list[Callable[[Path, Path], object]] = [_share_blocks, os.link]
    if symbolic:
        ways.append(os.symlink)
    try:
        for way in ways:
            try:
                way(source, temporary)
                break
            except FileNotFoundError:
                raise
            except OSError:
                temporary.unlink(missing_ok=True)
        else:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # renaming onto another link of the same file does nothing


def _share_blocks(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("xb") as writing:
        fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())


def parallel(function: Callable[[_Item], _Out], items: Sequence[_Item], workers: int = _PARALLEL_FILES) -> list[_Out]:
    """Apply the function to every item in threads; results in order. The first error is raised, the rest cancelled."""
    with ThreadPoolExecutor(max_workers=max(1, min(workers, len(items)))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
