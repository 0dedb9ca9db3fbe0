"""What every store does alike: keys, the commit protocol, verified reading.

No manifest, no artifact: a product's files are uploaded and verified first, and one conditional put of manifest.json
makes them exist. Readers start from the manifest and check size and sha256 of what they use. What a single answer of a
store says is no proof of damage: a product is called damaged when the same wrong content came twice and the store's
own listing agrees with it.
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
from radlads.tasks.contracts.store.files import VerifiedFiles, clear_unlisted, parallel
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
    def read(self, key: str, *, limit: int | None = None) -> tuple[bytes, str] | None:
        """(content, version) of a small object; None if there is none. version: changes with every write, for
        `replace`. limit: bytes; raises CorruptArtifact for more."""

    def get_bytes(self, key: str) -> bytes | None:
        """Read a small object; None if there is none."""
        found = self.read(key)
        return None if found is None else found[0]

    @abstractmethod
    def replace(self, key: str, data: bytes, version: str) -> bool:
        """Write a small object if it still has this version; whether what is there afterwards is `data`. Atomic as
        far as the endpoint can: see probe."""

    @abstractmethod
    def age(self, key: str) -> float | None:
        """Seconds since the object was written, by the store's own clock; None where that cannot be told."""

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Key → size in bytes of every object under the prefix."""

    def list(self, prefix: str) -> list[str]:
        """Every key under the prefix, sorted."""
        return sorted(self.sizes(prefix))

    def delete(self, prefix: str, *, keep: Collection[str] = ()) -> None:
        """Delete everything under the prefix but the keys to keep, its manifest first, so that no half-deleted product
        looks committed."""
        keys = [key for key in self.list(check_key(prefix)) if key not in keep]
        manifests = [key for key in keys if key.rsplit("/", 1)[-1] == MANIFEST]
        self._delete_keys(manifests)
        self._delete_keys([key for key in keys if key not in set(manifests)])
        self._tidy(prefix)

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one; whether this call wrote it. Atomic among any number of writers
        (as far as the endpoint can: see probe)."""

    @abstractmethod
    def copy(self, source: str, target: str, entry: FileEntry) -> None:
        """Have the content of one object under another key as well, without bringing it here: a copy made by the
        server, or a second link to a file. Replaces what is at the target.

        entry: size and sha256 of the content. Raises CorruptArtifact where the source or what arrived is not that,
        StoreError.
        """

    @abstractmethod
    def probe(self) -> dict[str, bool | str]:
        """What the place can do: {"uri", "conditional_put", "conditional_replace", "conditional_multipart",
        ...}."""

    # Products

    def commit(
        self, prefix: str, folder: Path, manifest: Manifest, *, guard: Callable[[], None] = lambda: None
    ) -> Manifest:
        """Make a folder the product at a prefix: upload every file, verify what arrived, write the manifest last.

        The manifest comes without `files`; the committed one is returned. The same digest already committed is
        returned as it is. guard: called before the upload and once more before the manifest is written; raises where
        this writer may write no longer. Raises CommitConflict for another digest, CorruptArtifact if what arrived is
        not what was sent, StoreError.
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
                raise StoreError(f"{self.join(prefix)}: the manifest was refused, yet there is none; try again")
            return self._agree(prefix, existing, manifest)

    def adopt(self, prefix: str, manifest: Manifest) -> None:
        """Make files that lie under a prefix already, and were verified, a product: write the manifest that lists them.

        Raises CorruptArtifact unless they are all there, CommitConflict for another digest, StoreError.
        """
        self.verify(prefix, manifest)
        if not self._publish(f"{check_key(prefix)}/{MANIFEST}", _dump(manifest)):
            existing = self.open_manifest(prefix)
            self.verify(prefix, self._agree(prefix, existing, manifest))

    def settle(self, prefix: str, manifest: Manifest) -> None:
        """What follows a commit, and may be repeated: no unfinished attempt's file stays under the name of one of the
        product's own, for those who read the place without its manifest."""
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
                fault = "it is listed and cannot be read"
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
        """Check that every file of a product is there with its size (by listing; contents are checked by fetch).

        Raises CorruptArtifact where two listings agree on a fault, StoreError where they do not.
        """
        prove_listing(self.join(prefix), prefix, manifest, lambda: self.sizes(prefix))

    def fetch(self, prefix: str, into: Path, *, subset: str = "") -> Path:
        """A local folder that holds exactly the product's files, verified by size and sha256; returns `into`.

        subset: only the files at or under this path ("model", "plan.json"). into: the fetch's own folder; whatever else
        lies in it is removed. A store that is a folder puts links there instead of copies, others download what is
        not there yet. Treat the files as read-only. Raises StoreError if nothing is committed at the prefix,
        CorruptArtifact.
        """
        manifest = self.open_manifest(prefix)
        wanted = [e for e in manifest.files if not subset or e.path == subset or e.path.startswith(subset + "/")]
        if subset and not wanted:
            raise StoreError(f"{self.join(prefix)} has no '{subset}'")
        self._check_apart(into)
        into.mkdir(parents=True, exist_ok=True)
        clear_unlisted(into, [entry.path for entry in wanted])
        self._open_files(prefix, wanted, into)
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

    # What a kind of store provides

    @abstractmethod
    def _upload(self, prefix: str, name: str, path: Path) -> FileEntry:
        """Bring one file of a product under the prefix and verify what arrived. Raises CorruptArtifact."""

    @abstractmethod
    def _open_files(self, prefix: str, entries: Sequence[FileEntry], into: Path) -> None:
        """Put the files into a folder, each verified. Raises CorruptArtifact, StoreError."""

    @abstractmethod
    def _delete_keys(self, keys: Sequence[str]) -> None: ...

    def _tidy(self, prefix: str) -> None:
        """Remove what abandoned attempts left under the prefix and no reader can see."""
        return

    def _exclusive(self, prefix: str) -> AbstractContextManager[object]:
        """Keep other writers out during a commit, where the place offers a lock that dies with its holder."""
        return nullcontext()

    def _check_apart(self, into: Path) -> None:
        """Raises StoreError for a folder that a fetch must not clear."""
        return

    # Shared by the kinds

    def _publish(self, key: str, data: bytes) -> bool:
        """put_if_absent, read back: what a writer believes to be committed can be read. Whether this call wrote it.

        Raises StoreError where the place does not keep what it is given; nothing is committed then.
        """
        if not self.put_if_absent(key, data):
            return False
        for pause in PAUSES:
            time.sleep(pause)
            found = self.read(key)
            if found is not None and found[0] == data:
                return True
            if found is not None:  # nobody else writes where a manifest is: this is ours, altered on its way
                self.replace(key, data, found[1])
        self._delete_keys([key])
        raise StoreError(f"{self.uri}/{key}: what was written does not come back as it was sent; nothing is committed")

    def _prove(self, prefix: str, entry: FileEntry, attempt: Callable[[], tuple[int, str] | None]) -> None:
        """Call attempt until what it read, (size, sha256), is the entry's. Raises CorruptArtifact, StoreError."""
        key = place_of(prefix, entry)
        prove_file(self.join(prefix), entry, attempt, lambda: self.sizes(key).get(key))

    def _agree(self, prefix: str, existing: Manifest, wanted: Manifest) -> Manifest:
        if existing.digest == wanted.digest:
            return existing
        raise conflict(self.join(prefix), existing.digest, wanted.digest)


def _dump(manifest: Manifest) -> bytes:
    """The manifest as it is stored. Raises StoreError for what no reader would take, and for NaN, which pydantic would
    silently write as null."""
    check_files(manifest.files)
    try:
        canonical_json({"metrics": manifest.metrics, "spec": manifest.spec})
    except ValueError:
        raise StoreError("a manifest is strict JSON: a metric or a spec value is NaN or infinite") from None
    data = manifest.model_dump_json(indent=1).encode() + b"\n"
    if len(data) > MANIFEST_BYTES:
        raise StoreError(f"a manifest of {len(data):,} bytes is too long: {len(manifest.files):,} files are too many")
    return data
