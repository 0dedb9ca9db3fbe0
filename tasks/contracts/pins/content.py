"""sha256 of files, cached by size, times and inode."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import canonical_json

_THREADS = 4
# Smaller files are cheaper to hash again than to cache.
_WORTH_KEEPING = 1 << 20
# File-system timestamps are coarse: a file changed less than this ago may change again with the same timestamps.
_SETTLED_NS = 2_000_000_000
_SKIPPED = {"__pycache__"}

_Stamp = tuple[int, int, int, int]


class ContentHashes:
    """Computes sha256 of files.

    A file is hashed again only if its size, times or inode changed. cache: a JSON file that keeps the hashes of large
    files between processes; None: no cache.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._known: dict[str, tuple[_Stamp, str]] = {}
        self._new: set[str] = set()
        if cache is not None:
            self._known = _read_cache(cache)

    def of(self, path: Path) -> str:
        """sha256 (hex) of a file. Raises UserError."""
        return self.of_all([path])[0]

    def of_all(self, paths: Sequence[Path]) -> list[str]:
        """sha256 (hex) of each file, in order, read in parallel. Raises UserError."""
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = list(pool.map(self._hash, paths))
        self._save()
        return hashes

    def _hash(self, path: Path) -> str:
        key = str(path.absolute())
        try:
            now, stamp = time.time_ns(), _stamp(path)
            known = self._known.get(key)
            if known is not None and known[0] == stamp:
                return known[1]
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            changed = _stamp(path) != stamp
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if changed:
            raise UserError(f"{path} changed while it was read; wait until it is complete, and start again")
        if now - max(stamp[1], stamp[2]) > _SETTLED_NS:
            self._known[key] = (stamp, digest)
            if stamp[0] >= _WORTH_KEEPING:
                self._new.add(key)
        return digest

    def _save(self) -> None:
        """Add new hashes to the cache. Concurrent writers may lose entries, which only costs time."""
        if self._cache is None or not self._new:
            return
        kept = {key: value for key, value in _read_cache(self._cache).items() if Path(key).is_file()}
        kept |= {key: self._known[key] for key in self._new}
        self._new.clear()
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._cache.parent, prefix=f".{self._cache.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({key: [*stamp, digest] for key, (stamp, digest) in kept.items()}, file)
        os.replace(name, self._cache)


def hash_of(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def walk_files(folder: Path) -> Iterator[str]:
    """Relative POSIX names of all files in a folder, sorted. Skips hidden files and Python caches; follows links."""
    seen: set[str] = set()
    names: list[str] = []
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _is_skipped(name)]
        names += [Path(root, name).relative_to(folder).as_posix() for name in files if not _is_skipped(name)]
    yield from sorted(names)


def matching_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Relative names of the files in a folder that match any of the patterns, sorted."""
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return sorted(name for name in names if (folder / name).is_file())


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name in _SKIPPED


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    # Includes the change time, because copying tools can set the modification time.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read_cache(path: Path) -> dict[str, tuple[_Stamp, str]]:
    """The entries of the cache; empty if it is missing or damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): ((int(size), int(modified), int(changed), int(inode)), str(digest))
            for key, (size, modified, changed, inode, digest) in read.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
