"""What every store does alike: keys, the commit protocol, verified reading.

No manifest, no artifact: a product's files are uploaded and verified first, and one conditional put of manifest.json
makes them exist. Readers start from the manifest and check size and sha256 of what they use.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from radlads.tasks.job import SCHEMA_VERSION, FileEntry, Manifest, StoreRef, UserError, canonical_json

MANIFEST = "manifest.json"
_FORBIDDEN = re.compile(r"[\\\x00-\x1f\x7f]")
_PARALLEL_FILES = 8
_Item = TypeVar("_Item")
_Out = TypeVar("_Out")


class StoreError(Exception):
    """The store could not do what was asked."""


class StoreUnusable(StoreError, UserError):  # noqa: N818
    """The store cannot be reached as configured: no such bucket, no credentials, not a folder."""


class CorruptArtifact(StoreError):  # noqa: N818
    """A committed product is torn or altered: a file is missing, or its size or sha256 is not the manifest's."""


class StageConflict(StoreError, UserError):  # noqa: N818
    """Something else is already committed at this place."""


def check_key(key: str) -> str:
    """Return the key if it is a plain relative path with forward slashes. Raises StoreError otherwise."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or _FORBIDDEN.search(key) or len(key.encode()) > 900:
        raise StoreError(f"not a valid key: {key!r} (a relative path with forward slashes, without '.', '..' or '//')")
    return key


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and sha256 (hex) of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


class VerifiedFiles:
    """Hashes of local files already read in this process; a changed size, time or inode asks for reading again."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}

    def sha256(self, path: Path) -> str:
        """sha256 (hex) of the file. Raises FileNotFoundError."""
        status = os.stat(path)
        key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        if key not in self._known:
            self._known[key] = hash_file(path)[1]
        return self._known[key]


class Store(ABC):
    """A place for products. Keys are relative to the store's root; a product is everything under one prefix."""

    def __init__(self, ref: StoreRef, uri: str) -> None:
        self.ref = ref
        self.uri = uri
        self._verified = VerifiedFiles()

    # Places

    def join(self, *parts: str) -> str:
        """The uri of a key given in parts."""
        return f"{self.uri}/{check_key('/'.join(parts))}"

    def key(self, uri: str) -> str:
        """The key of a uri of this store. Raises StoreError for a uri of another store."""
        if not uri.startswith(self.uri + "/"):
            raise StoreError(f"{uri} is not in the store {self.uri}")
        return check_key(uri[len(self.uri) + 1 :])

    # Single objects

    @abstractmethod
    def put_file(self, key: str, path: Path) -> FileEntry:
        """Upload one file outside the commit protocol (a log, a recipe), replacing what was there."""

    @abstractmethod
    def put_bytes(self, key: str, data: bytes) -> None:
        """Write a small object, replacing what was there."""

    @abstractmethod
    def get_bytes(self, key: str) -> bytes | None:
        """Read a small object; None if there is none."""

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Key → size in bytes of every object under the prefix."""

    def list(self, prefix: str) -> list[str]:
        """Every key under the prefix, sorted."""
        return sorted(self.sizes(prefix))

    def delete(self, prefix: str) -> None:
        """Delete everything under the prefix, its manifest first, so that no half-deleted product looks committed."""
        keys = self.list(check_key(prefix))
        manifests = [key for key in keys if key.rsplit("/", 1)[-1] == MANIFEST]
        self._delete_keys(manifests)
        self._delete_keys([key for key in keys if key not in set(manifests)])
        self._tidy(prefix)

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one; whether this call wrote it. Atomic among any number of writers
        (as far as the endpoint can: see probe)."""

    @abstractmethod
    def probe(self) -> dict[str, bool | str]:
        """What the place can do: {"uri", "conditional_put", "conditional_multipart"}."""

    # Products

    def commit(self, prefix: str, folder: Path, manifest: Manifest) -> Manifest:
        """Make a folder the product at a prefix: upload every file, verify what arrived, write the manifest last.

        The manifest comes without `files`; the committed one is returned. The same digest already committed is
        returned as it is. Raises StageConflict for another digest, CorruptArtifact if what arrived is not what was
        sent, StoreError.
        """
        check_key(prefix)
        with self._exclusive(prefix):
            existing = self.read_manifest(prefix)
            if existing is not None:
                return self._agree(prefix, existing, manifest)
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [path.relative_to(folder).as_posix() for path in paths]
            if MANIFEST in names:
                raise StoreError(f"{folder} holds a {MANIFEST} of its own; the store writes that one")
            entries = parallel(lambda pair: self._upload(prefix, *pair), list(zip(names, paths, strict=True)))
            full = manifest.model_copy(update={"files": tuple(sorted(entries, key=lambda entry: entry.path))})
            if self.put_if_absent(f"{prefix}/{MANIFEST}", _dump(full)):
                self._tidy(prefix)
                return full
            existing = self.read_manifest(prefix)
            if existing is None:
                raise StoreError(f"{self.join(prefix)}: the manifest was refused, yet there is none; try again")
            return self._agree(prefix, existing, manifest)

    def read_manifest(self, prefix: str) -> Manifest | None:
        """The manifest at a prefix; None if nothing is committed there. Raises CorruptArtifact."""
        data = self.get_bytes(f"{check_key(prefix)}/{MANIFEST}")
        if data is None:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValidationError:
            raise CorruptArtifact(f"{self.join(prefix)}/{MANIFEST} is not a manifest of this version") from None

    def verify(self, prefix: str, manifest: Manifest) -> None:
        """Check that every file of a product is there with its size (one listing; contents are checked by fetch).

        Raises CorruptArtifact.
        """
        sizes = self.sizes(prefix)
        for entry in manifest.files:
            size = sizes.get(place_of(prefix, entry))
            if size != entry.size:
                found = "missing" if size is None else f"{size} bytes long"
                raise self._corrupt(prefix, f"{entry.path} is {found}, the manifest says {entry.size} bytes")

    def fetch(self, prefix: str, into: Path, *, subset: str = "") -> Path:
        """A local folder with the product's files, verified by size and sha256.

        subset: only the files at or under this path ("model", "plan.json"). A store that is a folder returns its own;
        others download into `into`, keeping what is already there and right. Raises StoreError if nothing is
        committed at the prefix, CorruptArtifact.
        """
        manifest = self.open_manifest(prefix)
        wanted = [e for e in manifest.files if not subset or e.path == subset or e.path.startswith(subset + "/")]
        if subset and not wanted:
            raise StoreError(f"{self.join(prefix)} has no '{subset}'")
        return self._open_files(prefix, wanted, into)

    def read_file(self, prefix: str, path: str) -> bytes:
        """The content of one small file of a product, verified. Raises StoreError, CorruptArtifact."""
        manifest = self.open_manifest(prefix)
        entry = next((e for e in manifest.files if e.path == path), None)
        if entry is None:
            raise StoreError(f"{self.join(prefix)} has no '{path}'")
        data = self.get_bytes(place_of(prefix, entry))
        if data is None or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self._corrupt(prefix, f"{path} is missing or altered")
        return data

    def open_manifest(self, prefix: str) -> Manifest:
        """The manifest at a prefix. Raises StoreError if nothing is committed there, CorruptArtifact."""
        manifest = self.read_manifest(prefix)
        if manifest is None:
            raise StoreError(f"nothing is committed at {self.join(prefix)}")
        return manifest

    # What a kind of store provides

    @abstractmethod
    def _upload(self, prefix: str, name: str, path: Path) -> FileEntry:
        """Bring one file of a product under the prefix and verify what arrived. Raises CorruptArtifact."""

    @abstractmethod
    def _open_files(self, prefix: str, entries: Sequence[FileEntry], into: Path) -> Path: ...

    @abstractmethod
    def _delete_keys(self, keys: Sequence[str]) -> None: ...

    def _tidy(self, prefix: str) -> None:
        """Remove what abandoned attempts left under the prefix and no reader can see."""
        return

    def _exclusive(self, prefix: str) -> AbstractContextManager[object]:
        """Keep other writers out during a commit, where the place offers a lock that dies with its holder."""
        return nullcontext()

    # Shared by the kinds

    def _check_local(self, prefix: str, entry: FileEntry, path: Path) -> None:
        """Raises CorruptArtifact unless the local file is the entry's."""
        try:
            size = path.stat().st_size
            good = size == entry.size and self._verified.sha256(path) == entry.sha256
        except FileNotFoundError:
            raise self._corrupt(prefix, f"{entry.path} is missing") from None
        if not good:
            what = f"{size} bytes long, not {entry.size}" if size != entry.size else "altered (another sha256)"
            raise self._corrupt(prefix, f"{entry.path} is {what}")

    def _corrupt(self, prefix: str, fault: str) -> CorruptArtifact:
        return CorruptArtifact(
            f"{self.join(prefix)}: {fault}; delete this prefix to have it made again, or choose a new run name"
        )

    def _agree(self, prefix: str, existing: Manifest, wanted: Manifest) -> Manifest:
        if existing.digest == wanted.digest:
            return existing
        raise conflict(self.join(prefix), existing.digest, wanted.digest)


def conflict(uri: str, existing: str, wanted: str) -> StageConflict:
    """The error for a place that holds another digest."""
    return StageConflict(
        f"{uri} already holds another result (digest {existing[:12]}, this recipe asks for {wanted[:12]}): "
        "nothing is overwritten; choose a new run name, or put the recipe back as it was"
    )


def older_schema(uri: str, manifest: Manifest) -> str:
    """Why a product of another schema version is not compared with what is asked for."""
    return (
        f"{uri} was made by another version of radlads (schema {manifest.schema_version}, this one has "
        f"{SCHEMA_VERSION}), so it cannot be told whether it is what is asked for; nothing is overwritten: choose a "
        "new run name"
    )


def place_of(prefix: str, entry: FileEntry) -> str:
    """The key at which a product's file lies."""
    return f"{prefix}/{check_key(entry.stored_as or entry.path)}"


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


def read_blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """The file's content in blocks."""
    with path.open("rb") as stream:
        while block := stream.read(size):
            yield block


def _dump(manifest: Manifest) -> bytes:
    """The manifest as it is stored. Raises StoreError for NaN, which pydantic would silently write as null."""
    try:
        canonical_json({"metrics": manifest.metrics, "spec": manifest.spec})
    except ValueError:
        raise StoreError("a manifest is strict JSON: a metric or a spec value is NaN or infinite") from None
    return manifest.model_dump_json(indent=1).encode() + b"\n"
