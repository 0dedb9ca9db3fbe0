"""A store in a folder: the default, on a local or a shared filesystem."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from radlads.tasks.contracts.disk import need_space
from radlads.tasks.contracts.job import FileEntry, StoreRef
from radlads.tasks.contracts.parsing.files import MENDABLE, explain_os_error
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import CorruptArtifact, StoreError, StoreUnusable, corrupt
from radlads.tasks.contracts.store.files import TEMPORARY, Block, cut, parallel, place_file, read_blocks
from radlads.tasks.contracts.store.names import check_key, place_of

_LOCKS = ".locks"
_BLOCK_BYTES = 4 << 20
_LEASE = f"{TEMPORARY}lease-"
"""Prefix of a lease's temporary file: the holder may be writing one while a commit cleans up beside it."""
_P = ParamSpec("_P")
_R = TypeVar("_R")
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def _plain(method: Callable[Concatenate[LocalStore, _P], _R]) -> Callable[Concatenate[LocalStore, _P], _R]:
    """Decorates a method: an error of the filesystem becomes a StoreError of one line."""

    @functools.wraps(method)
    def explained(self: LocalStore, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            kind = StoreUnusable if error.errno in MENDABLE else StoreError
            raise kind(f"the store {self.root}: {explain_os_error(error)}") from error

    return explained


class LocalStore(Store):
    """Files are written to a temporary name, synced and renamed; the manifest is hard-linked into place, which fails if
    one exists. A lock file per prefix serialises commits; the kernel releases it when its holder ends."""

    def __init__(self, ref: StoreRef) -> None:
        root = Path(ref.uri.removeprefix("file://")).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise StoreUnusable(f"the store {root} is not a folder")
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnusable(explain_os_error(error, f"the store {root}")) from None
        super().__init__(ref, str(root))
        self.root = root
        self._real = root.resolve()

    @_plain
    def put_file(self, key: str, path: Path) -> FileEntry:
        """See Store."""
        target = self._path(key)
        size, sha256 = self._write(read_blocks(path), target)
        return FileEntry(path=key, size=size, sha256=sha256)

    @_plain
    def put_bytes(self, key: str, data: bytes) -> None:
        """See Store."""
        target = self._path(key)
        temporary = self._write_beside(target, data)
        os.replace(temporary, target)
        _sync_folder(target.parent)

    @_plain
    def put_blocks(self, key: str, blocks: Sequence[Block]) -> FileEntry:
        """See Store."""
        size, sha256 = self._write(cut(blocks, _BLOCK_BYTES), self._path(key))
        return FileEntry(path=key, size=size, sha256=sha256)

    def need_space(self, size: int, what: str) -> None:
        """See Store."""
        need_space(self.root, size, what)

    @_plain
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

    @_plain
    def read(self, key: str, *, limit: int | None = None) -> tuple[bytes, str] | None:
        """See Store. The version is the content's sha256 and the time of writing."""
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if limit is not None and status.st_size > limit:
                    raise corrupt(f"{self.uri}/{key}", f"it is too long ({status.st_size:,} bytes)")
                data = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data, f"{hashlib.sha256(data).hexdigest()}-{status.st_mtime_ns}-{status.st_ino}"

    @_plain
    def replace(self, key: str, data: bytes, version: str) -> bool:
        """See Store."""
        with self._exclusive(f"{key} itself"):
            found = self.read(key)
            if found is None or found[1] != version:
                return found is not None and found[0] == data
            self.put_bytes(key, data)
            return True

    @_plain
    def age(self, key: str) -> float | None:
        """See Store. The clock is that of the file server: a second file is written to read it."""
        target = self._path(key)
        if not target.exists():  # nothing is made beside it
            return None
        now = self._write_beside(target, b"")
        try:
            return max(0.0, now.stat().st_mtime - target.stat().st_mtime)
        except FileNotFoundError:
            return None
        finally:
            now.unlink(missing_ok=True)

    @_plain
    def sizes(self, prefix: str) -> dict[str, int]:
        """See Store."""
        top = self._path(prefix)
        if not top.is_dir():
            return {prefix: os.lstat(top).st_size} if os.path.lexists(top) else {}
        found = {}
        for folder, _, names in os.walk(top):
            for name in names:
                if not name.startswith(TEMPORARY):
                    path = Path(folder, name)
                    try:
                        size = (path.stat() if path.is_file() else path.lstat()).st_size
                    except FileNotFoundError:  # removed in the meantime
                        continue
                    found[path.relative_to(self.root).as_posix()] = size
        return found

    @_plain
    def copy(self, source: str, target: str, entry: FileEntry) -> None:
        """See Store."""
        origin, place = self._path(source).resolve(), self._path(target)
        try:
            place_file(origin, place, symbolic=False)
        except FileNotFoundError:
            raise corrupt(self.join(source), "it is missing") from None
        _sync_folder(place.parent)
        if (place.stat().st_size, self._verified.sha256(place)) != (entry.size, entry.sha256):
            place.unlink()
            raise corrupt(self.join(source), "its content does not match its manifest")

    def probe(self) -> dict[str, bool | str]:
        """See Store."""
        return {"uri": self.uri, "conditional_put": True, "conditional_replace": True, "conditional_multipart": True}

    def _path(self, key: str) -> Path:
        """The path of a key. Raises StoreUnusable if a link on the path leads out of the store."""
        return self._inside(self.root / check_key(key))

    def _inside(self, path: Path) -> Path:
        if not path.resolve().is_relative_to(self._real):
            raise StoreUnusable(
                f"{path} leads out of the store {self.root} by a link; replace the link by its target, or remove it"
            )
        return path

    @_plain
    def _upload(self, prefix: str, name: str, path: Path) -> FileEntry:
        size, sha256 = self._write(read_blocks(path), self._path(f"{prefix}/{name}"))
        return FileEntry(path=name, size=size, sha256=sha256)

    def _write(self, blocks: Iterable[Block], target: Path) -> tuple[int, str]:
        """Write durably and atomically; returns size and sha256, taken while writing. Raises CorruptArtifact if the
        file system then has another size."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        digest = hashlib.sha256()
        size = 0
        try:
            with temporary.open("wb") as stream:
                for block in blocks:
                    digest.update(block)
                    size += stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
            if temporary.stat().st_size != size:
                raise CorruptArtifact(f"{target}: the file written does not match its source")
            self._verified.note(temporary, digest.hexdigest())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return size, digest.hexdigest()

    def _write_beside(self, target: Path, data: bytes) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        mark = _LEASE if target.name == "lease.json" else TEMPORARY
        temporary = target.parent / f"{mark}{uuid.uuid4().hex}"
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return temporary

    def _open_files(self, prefix: str, entries: Sequence[FileEntry], into: Path) -> None:
        parallel(lambda entry: self._open(prefix, entry, into / check_key(entry.path)), entries)

    @_plain
    def _open(self, prefix: str, entry: FileEntry, target: Path) -> None:
        """Verifies the file that the caller gets: the one at the target, after it was placed there."""
        key = place_of(prefix, entry)
        source = self._path(key).resolve()

        def attempt() -> tuple[int, str] | None:
            if not source.is_file():
                return None
            place_file(source, target)
            return target.stat().st_size, self._verified.sha256(target)

        try:
            self._prove(prefix, entry, attempt)
        except StoreError:
            target.unlink(missing_ok=True)
            raise

    def _check_apart(self, into: Path) -> None:
        real = into.resolve()
        if real.is_relative_to(self._real) or self._real.is_relative_to(real):
            raise StoreError(f"{into} and the store {self.root} contain one another: nothing is fetched there")

    @_plain
    def _delete_keys(self, keys: Sequence[str]) -> None:
        for key in keys:
            path = self.root / check_key(key)
            self._inside(path.parent)
            path.unlink(missing_ok=True)  # removes a link, not its target

    @_plain
    def _tidy(self, prefix: str) -> None:
        top = self._path(prefix)
        for leftover in top.rglob(f"{TEMPORARY}*"):
            if not leftover.name.startswith(_LEASE):
                leftover.unlink(missing_ok=True)
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):  # not empty
                os.rmdir(folder)

    @contextmanager
    def _exclusive(self, prefix: str) -> Iterator[None]:
        folder = self.root / _LOCKS
        folder.mkdir(exist_ok=True)
        name = hashlib.sha256(prefix.encode()).hexdigest()[:32]
        with (folder / name).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: otherwise a power failure may undo it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
