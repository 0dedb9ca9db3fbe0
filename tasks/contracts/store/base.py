"""The part that all kinds of store share: keys, the commit protocol, verified reads.

No manifest, no artifact: a product's files are uploaded and verified first, then one conditional put of manifest.json
makes them visible. Readers start from the manifest and check size and sha256 of the files that they use. A single
response of a store does not prove damage: a product is reported as damaged only if the same wrong content was read
twice and the store's listing agrees with it.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from radlads.tasks.contracts.job import FileEntry, Manifest, StoreRef, canonical_json
from radlads.tasks.contracts.store.errors import StoreError, conflict, corrupt, unsteady
from radlads.tasks.contracts.store.files import Block, VerifiedFiles, clear_unlisted, parallel
from radlads.tasks.contracts.store.names import (
    MANIFEST,
    MANIFEST_BYTES,
    check_files,
    check_key,
    parse_manifest,
    place_of,
    product_files,
)
from radlads.tasks.contracts.store.proof import PAUSES, prove_file, prove_listing


class Store(ABC):
    """A store of products. Keys are relative to the store's root; a product is all objects under one prefix."""

    def __init__(self, ref: StoreRef, uri: str) -> None:
        self.ref = ref
        self.uri = uri
        self._verified = VerifiedFiles()

    # Places

    def join(self, *parts: str) -> str:
        """The uri of the key that the parts form."""
        return f"{self.uri}/{check_key('/'.join(parts))}"

    def key(self, uri: str) -> str:
        """The key of a uri of this store. Raises StoreError for a uri of another store."""
        if not uri.startswith(self.uri + "/"):
            raise StoreError(f"{uri} is not in the store {self.uri}")
        return check_key(uri[len(self.uri) + 1 :])

    # Single objects

    @abstractmethod
    def put_file(self, key: str, path: Path) -> FileEntry:
        """Upload one file outside the commit protocol (a log, a recipe); replaces an existing object."""

    @abstractmethod
    def put_bytes(self, key: str, data: bytes) -> None:
        """Write a small object; replaces an existing one."""

    @abstractmethod
    def put_blocks(self, key: str, blocks: Sequence[Block]) -> FileEntry:
        """Upload one file of any size from memory, for `adopt`: hashed on its way and verified, with no second copy of
        it. The key must be of this writer alone. Raises CorruptArtifact if the upload is not what was sent, StoreError.
        """

    def need_space(self, size: int, what: str) -> None:
        """Raises DiskFull if the store is on a disk without room for `size` bytes."""
        return

    @abstractmethod
    def read(self, key: str, *, limit: int | None = None) -> tuple[bytes, str] | None:
        """(content, version) of a small object; None if it does not exist. version: changes with every write, for
        `replace`. limit: bytes; raises CorruptArtifact for more."""

    def get_bytes(self, key: str) -> bytes | None:
        """Read a small object; None if it does not exist."""
        found = self.read(key)
        return None if found is None else found[0]

    @abstractmethod
    def replace(self, key: str, data: bytes, version: str) -> bool:
        """Write a small object if it still has this version; returns whether its content is `data` afterwards. As
        atomic as the endpoint allows: see probe."""

    @abstractmethod
    def age(self, key: str) -> float | None:
        """Seconds since the object was written, by the store's own clock; None if unknown."""

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Key → size in bytes of every object under the prefix."""

    def list(self, prefix: str) -> list[str]:
        """Every key under the prefix, sorted."""
        return sorted(self.sizes(prefix))

    def delete(self, prefix: str, *, keep: Collection[str] = ()) -> None:
        """Delete everything under the prefix except the keys in `keep`, the manifest first, so that a partly deleted
        product does not look committed."""
        keys = [key for key in self.list(check_key(prefix)) if key not in keep]
        manifests = [key for key in keys if key.rsplit("/", 1)[-1] == MANIFEST]
        self._delete_keys(manifests)
        self._delete_keys([key for key in keys if key not in set(manifests)])
        self._tidy(prefix)

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object unless it exists; returns whether this call wrote it. Atomic among any number of
        writers, as far as the endpoint allows: see probe."""

    @abstractmethod
    def copy(self, source: str, target: str, entry: FileEntry) -> None:
        """Copy one object to another key without downloading it: by the server, or as a second link to a file. Replaces
        an existing object at the target.

        entry: expected size and sha256. Raises CorruptArtifact if the source or the copy does not match it, StoreError.
        """

    @abstractmethod
    def probe(self) -> dict[str, bool | str]:
        """Capabilities of the store: {"uri", "conditional_put", "conditional_replace", "conditional_multipart",
        ...}."""

    # Products

    def commit(
        self, prefix: str, folder: Path, manifest: Manifest, *, guard: Callable[[], None] = lambda: None
    ) -> Manifest:
        """Commit a folder as the product at a prefix: upload every file, verify the uploads, write the manifest last.

        The manifest is passed without `files`; the committed one is returned. If the same digest is already committed,
        its manifest is returned unchanged. guard: called before the upload and again before the manifest is written;
        raises if this writer may no longer write. Raises CommitConflict for another digest, CorruptArtifact if an
        upload does not match its source, StoreError.
        """
        check_key(prefix)
        with self._exclusive(prefix):
            existing = self.read_manifest(prefix)
            if existing is not None:
                return self._agree(prefix, existing, manifest)
            guard()
            entries = parallel(lambda pair: self._upload(prefix, *pair), product_files(folder))
            full = manifest.model_copy(update={"files": tuple(sorted(entries, key=lambda entry: entry.path))})
            data = _dump(full)
            guard()
            if self._publish(f"{prefix}/{MANIFEST}", data):
                self.settle(prefix, full)
                self._tidy(prefix)
                return full
            existing = self.read_manifest(prefix)
            if existing is None:
                raise StoreError(f"{self.join(prefix)}: the store refused the manifest, yet holds none; try again")
            return self._agree(prefix, existing, manifest)

    def adopt(self, prefix: str, manifest: Manifest, *, guard: Callable[[], None] = lambda: None) -> None:
        """Commit files that already lie, verified, under a prefix: write the manifest that lists them. guard: as in
        commit. Raises CorruptArtifact if a file is missing, CommitConflict for another digest, StoreError.
        """
        self.verify(prefix, manifest)
        guard()
        if not self._publish(f"{check_key(prefix)}/{MANIFEST}", _dump(manifest)):
            existing = self.open_manifest(prefix)
            self.verify(prefix, self._agree(prefix, existing, manifest))

    def settle(self, prefix: str, manifest: Manifest) -> None:
        """Clean up after a commit; can be repeated. Replaces files that an unfinished attempt left under the names of
        the product's own, for readers that do not use the manifest."""
        return

    def read_manifest(self, prefix: str) -> Manifest | None:
        """The manifest at a prefix; None if nothing is committed there. Raises CorruptArtifact, StoreError."""
        key, seen, fault = f"{check_key(prefix)}/{MANIFEST}", b"", ""
        for pause in PAUSES:
            time.sleep(pause)
            found = self.read(key, limit=MANIFEST_BYTES)
            if found is None:
                if key not in self.sizes(key):
                    return None
                fault = "it is listed but cannot be read"
                continue
            try:
                return parse_manifest(found[0])
            except StoreError as error:
                fault = f"it is not a manifest of this version ({error})"
                if found[0] == seen and self.sizes(key).get(key) == len(seen):
                    raise corrupt(self.join(prefix), f"{MANIFEST} is not a manifest of this version: {error}") from None
                seen = found[0]
        raise unsteady(f"{self.join(prefix)}/{MANIFEST}", fault)

    def verify(self, prefix: str, manifest: Manifest) -> None:
        """Check by listing that every file of a product exists with its size; contents are checked by fetch. Raises
        CorruptArtifact if two listings agree on a fault, StoreError if they do not.
        """
        prove_listing(self.join(prefix), prefix, manifest, lambda: self.sizes(prefix))

    def fetch(self, prefix: str, into: Path, *, subset: str = "") -> Path:
        """A local folder that holds exactly the product's files, verified by size and sha256; returns `into`.

        subset: only the files at or under this path ("model", "plan.json"). into: a folder used by this fetch alone;
        other files in it are removed. A store in a folder creates links instead of copies, others download missing
        files. Treat the files as read-only. Raises StoreError if nothing is committed at the prefix, CorruptArtifact.
        """
        manifest = self.open_manifest(prefix)
        entries = [e for e in manifest.files if not subset or e.path == subset or e.path.startswith(subset + "/")]
        if subset and not entries:
            raise StoreError(f"{self.join(prefix)} has no '{subset}'")
        self._check_apart(into)
        into.mkdir(parents=True, exist_ok=True)
        clear_unlisted(into, [entry.path for entry in entries])
        self._open_files(prefix, entries, into)
        return into

    def read_file(self, prefix: str, path: str) -> bytes:
        """The content of one small file of a product, verified. Raises StoreError, CorruptArtifact."""
        manifest = self.open_manifest(prefix)
        entry = next((e for e in manifest.files if e.path == path), None)
        if entry is None:
            raise StoreError(f"{self.join(prefix)} has no '{path}'")
        kept = b""

        def attempt() -> tuple[int, str] | None:
            nonlocal kept
            data = self.get_bytes(place_of(prefix, entry))
            kept = data or b""
            return None if data is None else (len(data), hashlib.sha256(data).hexdigest())

        self._prove(prefix, entry, attempt)
        return kept

    def open_manifest(self, prefix: str) -> Manifest:
        """The manifest at a prefix. Raises StoreError if nothing is committed there, CorruptArtifact."""
        manifest = self.read_manifest(prefix)
        if manifest is None:
            raise StoreError(f"nothing is committed at {self.join(prefix)}")
        return manifest

    # Implemented by each kind of store

    @abstractmethod
    def _upload(self, prefix: str, name: str, path: Path) -> FileEntry:
        """Upload one file of a product to the prefix and verify the upload. Raises CorruptArtifact."""

    @abstractmethod
    def _open_files(self, prefix: str, entries: Sequence[FileEntry], into: Path) -> None:
        """Fetch the files into a folder and verify each. Raises CorruptArtifact, StoreError."""

    @abstractmethod
    def _delete_keys(self, keys: Sequence[str]) -> None: ...

    def _tidy(self, prefix: str) -> None:
        """Remove leftovers of abandoned attempts under the prefix that no reader can see."""
        return

    def _exclusive(self, prefix: str) -> AbstractContextManager[object]:
        """Exclude other writers during a commit, if the store offers a lock that is released when its holder dies."""
        return nullcontext()

    def _check_apart(self, into: Path) -> None:
        """Raises StoreError for a folder that a fetch must not clear."""
        return

    # Shared by all kinds

    def _publish(self, key: str, data: bytes) -> bool:
        """put_if_absent, then read back, so that a commit that is reported is readable. Returns whether this call wrote
        it. Raises StoreError if the store does not return the data that it was given; nothing is committed then.
        """
        if not self.put_if_absent(key, data):
            return False
        for pause in PAUSES:
            time.sleep(pause)
            found = self.read(key)
            if found is not None and found[0] == data:
                return True
            if found is not None:  # nobody else overwrites a manifest: this one was altered in transit
                self.replace(key, data, found[1])
        self._delete_keys([key])
        raise StoreError(f"{self.uri}/{key}: the content read back is not the content written; nothing is committed")

    def _prove(self, prefix: str, entry: FileEntry, attempt: Callable[[], tuple[int, str] | None]) -> None:
        """Call attempt until the (size, sha256) that it read match the entry. Raises CorruptArtifact, StoreError."""
        key = place_of(prefix, entry)
        prove_file(self.join(prefix), entry, attempt, lambda: self.sizes(key).get(key))

    def _agree(self, prefix: str, existing: Manifest, expected: Manifest) -> Manifest:
        if existing.digest == expected.digest:
            return existing
        raise conflict(self.join(prefix), existing.digest, expected.digest)


def _dump(manifest: Manifest) -> bytes:
    """The manifest serialised for the store. Raises StoreError for one that readers reject, and for NaN, which pydantic
    would silently write as null."""
    check_files(manifest.files)
    try:
        canonical_json({"metrics": manifest.metrics, "spec": manifest.spec})
    except ValueError:
        raise StoreError("a manifest is strict JSON: a metric or a spec value is NaN or infinite") from None
    data = manifest.model_dump_json(indent=1).encode() + b"\n"
    if len(data) > MANIFEST_BYTES:
        raise StoreError(f"a manifest of {len(data):,} bytes is too long: {len(manifest.files):,} files are too many")
    return data
