"""Local files: their hashes, and a folder that holds exactly the files that a product lists."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

TEMPORARY = ".tmp-"
_FICLONE = 0x40049409  # linux/fs.h: two files share blocks until one is written to
_PARALLEL_FILES = 8
Block = bytes | memoryview
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


def cut(blocks: Iterable[Block], size: int) -> Iterator[memoryview]:
    """The same bytes in pieces of at most `size`, none of which spans two blocks; nothing is copied."""
    for view in _views(blocks):
        for start in range(0, len(view), size):
            yield view[start : start + size]


def regroup(blocks: Iterable[Block], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of exactly `size`, and a last shorter one."""
    piece = bytearray()
    for view in _views(blocks):
        while len(view) > 0:
            taken = view[: size - len(piece)]
            piece += taken
            view = view[len(taken) :]
            if len(piece) == size:
                yield bytes(piece)
                piece.clear()
    if piece:
        yield bytes(piece)


def _views(blocks: Iterable[Block]) -> Iterator[memoryview]:
    views = (memoryview(block) for block in blocks)
    return (view.cast("B") for view in views if view.nbytes)  # an empty array has no view of its bytes


class VerifiedFiles:
    """Hashes of local files read in this process; a file is read again if its size, time or inode changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int, int], str] = {}

    def note(self, path: Path, sha256: str) -> None:
        """Record the hash of a file that this process has just written."""
        self._known[_stamp(path)] = sha256

    def sha256(self, path: Path) -> str:
        """sha256 (hex) of the file. Raises FileNotFoundError."""
        key = _stamp(path)
        if key not in self._known:
            self._known[key] = hash_file(path)[1]
        return self._known[key]


def _stamp(path: Path) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def clear_unlisted(folder: Path, listed: Collection[str]) -> None:
    """Remove from a folder all files that are not at a listed path, and all links to folders."""
    keep = set(listed)
    for place, folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            if path.relative_to(folder).as_posix() not in keep:
                path.unlink()
        for name in folders:
            path = Path(place, name)
            if path.is_symlink():
                path.unlink()
            elif path.relative_to(folder).as_posix() in keep:
                shutil.rmtree(path)
            else:
                with contextlib.suppress(OSError):  # it holds listed files
                    path.rmdir()


def place_file(source: Path, target: Path, *, symbolic: bool = True) -> None:
    """Make the content of `source` available at `target` without a copy if the filesystem can: by shared blocks, a hard
    link, or a symbolic link unless that is excluded; else copy it."""
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
