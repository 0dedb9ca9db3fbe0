"""A store in an S3 bucket, at AWS or any endpoint that speaks the protocol.

Endpoints differ: some ignore conditional writes, and none of those tried rejects a wrong sha256. So what the endpoint
honours is probed once, what arrived is proven on our side (an ETag that can only be the MD5 of what was sent, or else
by reading back), and readers hash what they download.

A file lies under its own name, where nothing is ever overwritten before the commit: content that an unfinished attempt
left there stays, and the file goes to `.objects/<sha256>` instead. After the commit no other attempt can commit any
more, and the name is given the committed content (`settle`), for those who read the place without its manifest.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.manager import TransferManager

from radlads.tasks.contracts.job import FileEntry, Manifest, StoreRef
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import CorruptArtifact, StoreError, StoreUnusable
from radlads.tasks.contracts.store.files import hash_file, parallel
from radlads.tasks.contracts.store.names import OBJECTS, check_key, place_of
from radlads.tasks.contracts.store.s3.client import (
    MISSING,
    TAKEN,
    age_of,
    code_of,
    make_client,
    plain_errors,
    put_object,
    read_object,
)
from radlads.tasks.contracts.store.s3.copy import copy_noted, is_noted
from radlads.tasks.contracts.store.s3.probe import abort_unfinished_uploads, probe_endpoint
from radlads.tasks.contracts.store.s3.seal import Seal, part_size, seal_file

_log = logging.getLogger(__name__)
_PART_BYTES = 16 << 20
_probed: dict[tuple[str | None, str], dict[str, bool]] = {}


class _KeyTaken(Exception):  # noqa: N818
    """Another writer completed this key first."""


class S3Store(Store):
    """Keys live under `s3://bucket/prefix`. Credentials come from the SDK's own chain, never from us."""

    def __init__(self, ref: StoreRef, *, part_bytes: int = _PART_BYTES) -> None:
        parts = urlsplit(ref.uri)
        if not parts.netloc:
            raise StoreUnusable(f"the store {ref.uri} names no bucket; it looks like s3://bucket/prefix")
        self._root = parts.path.strip("/")
        if self._root:
            check_key(self._root)
        super().__init__(ref, f"s3://{parts.netloc}" + (f"/{self._root}" if self._root else ""))
        self.bucket = parts.netloc
        self._part_bytes = part_bytes
        self._client = make_client(ref)
        # Product uploads go through a client of their own, whose multipart uploads complete only where nothing is.
        self._writer = make_client(ref)
        self._writer.meta.events.register(
            "before-parameter-build.s3.CompleteMultipartUpload", self._complete_only_if_absent
        )

    # Single objects

    def put_file(self, key: str, path: Path) -> FileEntry:
        """See Store."""
        size, sha256 = hash_file(path)
        if size <= self._part_bytes:
            self.put_bytes(key, path.read_bytes())
        else:
            with self._errors(key):
                self._client.upload_file(str(path), self.bucket, self._full(key), Config=self._transfer(size))
        return FileEntry(path=key, size=size, sha256=sha256)

    def put_bytes(self, key: str, data: bytes) -> None:
        """See Store."""
        with self._errors(key):
            self._put(key, data)

    def read(self, key: str, *, limit: int | None = None) -> tuple[bytes, str] | None:
        """See Store. The version is the ETag."""
        with self._errors(key):
            return read_object(self._client, self._place(key), limit)

    def replace(self, key: str, data: bytes, version: str) -> bool:
        """See Store. Where the endpoint ignores the condition: look, write, look again."""
        if not (able := self.probe())["conditional_replace"]:
            found = self.read(key)
            if found is not None and found[1] == version:
                self.put_bytes(key, data)
            return self.get_bytes(key) == data
        return self._put_if(key, data, IfMatch=version.strip('"') if able["bare_etags"] else version)

    def age(self, key: str) -> float | None:
        """See Store."""
        found = self._head(key)
        return None if found is None else age_of(found)

    def sizes(self, prefix: str) -> dict[str, int]:
        """See Store."""
        full = self._full(prefix)
        cut = len(self._root) + 1 if self._root else 0
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full)
            objects = [item for page in pages for item in page.get("Contents", [])]
        return {
            item["Key"][cut:]: item["Size"]
            for item in objects
            if item["Key"] == full or item["Key"].startswith(full + "/")
        }

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store. Where the endpoint ignores the condition: look, write, look again."""
        if not self.probe()["conditional_put"]:
            if self.get_bytes(key) is not None:
                return False
            self.put_bytes(key, data)
            return self.get_bytes(key) == data
        return self._put_if(key, data, IfNoneMatch="*")

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        for _ in range(5):
            with self._errors(key):
                try:
                    self._put(key, data, **condition)
                except ClientError as error:
                    if code_of(error) in TAKEN | MISSING:
                        # The SDK repeats a put whose answer was lost; then what is there is ours.
                        return self.get_bytes(key) == data
                    if code_of(error) != "ConditionalRequestConflict":
                        raise
                    continue
            return True
        raise StoreError(f"{self.join(key)}: other writers kept the endpoint busy; try again")

    def probe(self) -> dict[str, bool | str]:
        """See Store. Asked once per process and bucket; writes and removes one small object."""
        place = (self.ref.endpoint_url, self.bucket)
        if place not in _probed:
            key = f".probe/{uuid.uuid4().hex}"
            with self._errors(key):
                _probed[place] = probe_endpoint(self._client, self._place(key))
            if not (_probed[place]["conditional_put"] and _probed[place]["conditional_replace"]):
                _log.warning(
                    "%s ignores conditional writes (If-None-Match, If-Match): commits and the lease on a run look "
                    "before they write instead, so never run the same run name twice at once against this store",
                    self.ref.endpoint_url or self.uri,
                )
        return {"uri": self.uri, **_probed[place]}

    # Products

    def _upload(self, prefix: str, name: str, path: Path) -> FileEntry:
        size = path.stat().st_size
        seal = seal_file(path, part_size(size, self._part_bytes))
        entry = FileEntry(path=name, size=seal.size, sha256=seal.sha256)
        # An unfinished attempt may have left other content at the path, and a slow one may still be writing there:
        # nothing is overwritten, a place named by the content serves instead.
        for candidate in (entry, entry.model_copy(update={"stored_as": f"{OBJECTS}/{seal.sha256}"})):
            key = place_of(prefix, candidate)
            holds = self._holds(key, seal)
            if holds is None:
                self._send(key, path, seal)
                holds = self._holds(key, seal)
            if holds:
                return candidate
        raise CorruptArtifact(f"{self.join(key)}: what arrived is not what was sent ({path.name})")

    def settle(self, prefix: str, manifest: Manifest) -> None:
        """See Store."""
        for entry in manifest.files:
            if entry.stored_as is not None:
                try:
                    self._settle(prefix, entry)
                except StoreError as error:  # readers of the manifest are served all the same
                    _log.warning("%s still holds another attempt's %s: %s", self.join(prefix), entry.path, error)

    def _settle(self, prefix: str, entry: FileEntry) -> None:
        """Give a name the content that was committed for it, on the server; where that fails, take away what is there.

        Raises StoreError.
        """
        natural = f"{prefix}/{entry.path}"
        if self._is(natural, entry):
            return
        source, target = self._place(place_of(prefix, entry)), self._place(natural)
        try:
            with self._errors(natural):
                copy_noted(self._client, source, target, entry, self._transfer(entry.size))
            if self._is(natural, entry):
                return
        except (StoreError, KeyError) as error:
            _log.warning("%s: cannot be copied on the server, so it is removed: %s", self.join(natural), error)
        self._delete_keys([natural])

    def _is(self, key: str, entry: FileEntry) -> bool:
        found = self._head(key)
        if found is None or found["ContentLength"] != entry.size:
            return False
        return is_noted(found, entry) or self._read_back(key) == entry.sha256

    def _send(self, key: str, path: Path, seal: Seal) -> None:
        """Upload unless somebody else's object is there by then; what is there afterwards is for _holds to judge."""
        with self._errors(key):
            try:
                if seal.size > self._part_bytes:
                    with TransferManager(self._writer, self._transfer(seal.size)) as transfers:
                        transfers.upload(str(path), self.bucket, self._full(key)).result()
                else:
                    condition = {"IfNoneMatch": "*"} if self.probe()["conditional_put"] else {}
                    self._put(key, path.read_bytes(), **condition)
            except _KeyTaken:
                return
            except ClientError as error:
                if code_of(error) not in TAKEN:
                    raise

    def _complete_only_if_absent(self, params: dict[str, Any], **_: Any) -> None:
        """Botocore event before a multipart upload completes. Raises _KeyTaken."""
        if self.probe()["conditional_multipart"]:
            params["IfNoneMatch"] = "*"
        elif self._head_full(params["Key"]) is not None:
            raise _KeyTaken(params["Key"])

    def _holds(self, key: str, seal: Seal) -> bool | None:
        """Whether the object is what the seal says; None if there is no object."""
        found = self._head(key)
        if found is None:
            return None
        if found["ContentLength"] != seal.size:
            return False
        return found["ETag"].strip('"') in seal.etags or self._read_back(key) == seal.sha256

    def _read_back(self, key: str) -> str:
        digest = hashlib.sha256()
        with self._errors(key):
            for block in self._client.get_object(Bucket=self.bucket, Key=self._full(key))["Body"].iter_chunks(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _head(self, key: str) -> dict[str, Any] | None:
        return self._head_full(self._full(key))

    def _head_full(self, full: str) -> dict[str, Any] | None:
        with self._errors(full):
            try:
                found: dict[str, Any] = self._client.head_object(Bucket=self.bucket, Key=full)
            except ClientError as error:
                if code_of(error) in MISSING:
                    return None
                raise
        return found

    def _open_files(self, prefix: str, entries: Sequence[FileEntry], into: Path) -> None:
        parallel(lambda entry: self._download(prefix, entry, into / check_key(entry.path)), entries, workers=4)

    def _download(self, prefix: str, entry: FileEntry, path: Path) -> None:
        key = place_of(prefix, entry)
        path.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> tuple[int, str] | None:
            here = path.is_file() and not path.is_symlink()
            if not (here and path.stat().st_size == entry.size and self._verified.sha256(path) == entry.sha256):
                path.unlink(missing_ok=True)
                with self._errors(key):
                    try:
                        transfer = self._transfer(entry.size)
                        self._client.download_file(self.bucket, self._full(key), str(path), Config=transfer)
                    except ClientError as error:
                        if code_of(error) in MISSING:
                            return None
                        raise
            return path.stat().st_size, self._verified.sha256(path)

        try:
            self._prove(prefix, entry, attempt)
        except StoreError:
            path.unlink(missing_ok=True)
            raise

    def _delete_keys(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            objects = [{"Key": self._full(key)} for key in keys[start : start + 1000]]
            with self._errors(keys[start]):
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            if answer.get("Errors"):
                fault = answer["Errors"][0]
                raise StoreError(f"{self.uri}: cannot delete {fault.get('Key')}: {fault.get('Message')}")

    def _tidy(self, prefix: str) -> None:
        """Abort multipart uploads that nobody will finish: once a prefix is committed, no other writer can be."""
        try:
            abort_unfinished_uploads(self._client, self.bucket, self._full(prefix) + "/")
        except (ClientError, BotoCoreError) as error:
            _log.warning("%s: unfinished uploads could not be tidied: %s", self.join(prefix), error)

    # Plumbing

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        put_object(self._client, self._place(key), data, sha256=self.ref.endpoint_url is None, **condition)

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._full(key)}

    def _full(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}" if self._root else check_key(key)

    def _transfer(self, size: int) -> TransferConfig:
        part = part_size(size, self._part_bytes)
        return TransferConfig(multipart_threshold=self._part_bytes + 1, multipart_chunksize=part, max_concurrency=4)

    def _errors(self, key: str) -> AbstractContextManager[None]:
        return plain_errors(self.ref, self.bucket, f"{self.uri}/{key}")
