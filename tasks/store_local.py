"""A store in a folder: the embedded default, and what a shared filesystem offers."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from radlads.tasks.job import FileEntry, StoreRef
from radlads.tasks.store_base import (
    CorruptArtifact,
    Store,
    StoreUnusable,
    check_key,
    hash_file,
    place_of,
    read_blocks,
)

_TEMPORARY = ".tmp-"
_LOCKS = ".locks"
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class LocalStore(Store):
    """Files are written beside their place, synced and renamed; the manifest is hard-linked into place, which fails
    if there is one. A lock file per prefix serialises commits and goes away with the process that holds it."""

    def __init__(self, ref: StoreRef) -> None:
        root = Path(ref.uri.removeprefix("file://")).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise StoreUnusable(f"the store {root} is not a folder")
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnusable(f"the store {root} cannot be made: {error.strerror}") from None
        super().__init__(ref, str(root))
        self.root = root

    def put_file(self, key: str, path: Path) -> FileEntry:
        """See Store."""
        target = self._path(key)
        size, sha256 = self._copy(path, target)
        return FileEntry(path=key, size=size, sha256=sha256)

    def put_bytes(self, key: str, data: bytes) -> None:
        """See Store."""
        target = self._path(key)
        temporary = self._write_beside(target, data)
        os.replace(temporary, target)
        _sync_folder(target.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store."""
        target = self._path(key)
        temporary = self._write_beside(target, data)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            with self._exclusive(f"{key} itself"):
                if target.exists():
                    return False
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True

    def get_bytes(self, key: str) -> bytes | None:
        """See Store."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """See Store."""
        top = self._path(prefix)
        if top.is_file():
            return {prefix: top.stat().st_size}
        found = {}
        for folder, _, names in os.walk(top):
            for name in names:
                if not name.startswith(_TEMPORARY):
                    path = Path(folder, name)
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def probe(self) -> dict[str, bool | str]:
        """See Store."""
        return {"uri": self.uri, "conditional_put": True, "conditional_multipart": True}

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _upload(self, prefix: str, name: str, path: Path) -> FileEntry:
        target = self._path(f"{prefix}/{name}")
        size, sha256 = self._copy(path, target)
        if hash_file(target) != (size, sha256):
            raise CorruptArtifact(f"{target}: what was written is not what was sent")
        return FileEntry(path=name, size=size, sha256=sha256)

    def _copy(self, source: Path, target: Path) -> tuple[int, str]:
        """Copy durably and atomically; size and sha256 of what was read."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        digest = hashlib.sha256()
        size = 0
        try:
            with temporary.open("wb") as stream:
                for block in read_blocks(source):
                    digest.update(block)
                    size += stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return size, digest.hexdigest()

    def _write_beside(self, target: Path, data: bytes) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return temporary

    def _open_files(self, prefix: str, entries: Sequence[FileEntry], into: Path) -> Path:
        for entry in entries:
            self._check_local(prefix, entry, self._path(place_of(prefix, entry)))
        return self._path(prefix)

    def _delete_keys(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _tidy(self, prefix: str) -> None:
        top = self._path(prefix)
        for leftover in top.rglob(f"{_TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
        if top.is_dir() and not any(path.is_file() for path in top.rglob("*")):
            shutil.rmtree(top, ignore_errors=True)

    @contextmanager
    def _exclusive(self, prefix: str) -> Iterator[None]:
        folder = self.root / _LOCKS
        folder.mkdir(exist_ok=True)
        name = hashlib.sha256(prefix.encode()).hexdigest()[:32]
        with (folder / name).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: without it a power cut may forget the new name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
