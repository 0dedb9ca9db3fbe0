"""Single objects of an S3 bucket, at AWS or any endpoint that implements the protocol.

Endpoints differ: some ignore conditional writes, and none of those tried rejects a wrong sha256. So the endpoint's
behaviour is probed once.
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
from botocore.exceptions import ClientError

from radlads.tasks.contracts.job import FileEntry, StoreRef
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import CorruptArtifact, StoreError, StoreUnusable, corrupt
from radlads.tasks.contracts.store.files import hash_file
from radlads.tasks.contracts.store.names import check_key
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
from radlads.tasks.contracts.store.s3.probe import probe_endpoint
from radlads.tasks.contracts.store.s3.seal import part_size

_log = logging.getLogger(__name__)
PART_BYTES = 16 << 20
_probed: dict[tuple[str | None, str], dict[str, bool]] = {}


class S3Objects(Store):
    """Keys live under `s3://bucket/prefix`. Credentials come from the SDK's own chain, never from us."""

    def __init__(self, ref: StoreRef, *, part_bytes: int = PART_BYTES) -> None:
        parts = urlsplit(ref.uri)
        if not parts.netloc:
            raise StoreUnusable(f"the store {ref.uri} names no bucket; write it as s3://bucket/prefix")
        self._root = parts.path.strip("/")
        if self._root:
            check_key(self._root)
        super().__init__(ref, f"s3://{parts.netloc}" + (f"/{self._root}" if self._root else ""))
        self.bucket = parts.netloc
        self._part_bytes = part_bytes
        self._client = make_client(ref)

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
                        # The SDK repeats a put whose response was lost; then the existing object is this writer's own.
                        return self.get_bytes(key) == data
                    if code_of(error) != "ConditionalRequestConflict":
                        raise
                    continue
            return True
        raise StoreError(f"{self.join(key)}: other writers kept the endpoint busy; try again")

    def copy(self, source: str, target: str, entry: FileEntry) -> None:
        """See Store. The copy's metadata has its sha256; the content is read back if an endpoint drops that."""
        if self._is(target, entry):
            return
        found = self._head(source)
        if found is None or found["ContentLength"] != entry.size:
            raise corrupt(self.join(source), "it is missing, or its size differs from its manifest")
        with self._errors(target):
            copy_noted(self._client, self._place(source), self._place(target), entry, self._transfer(entry.size))
        if not self._is(target, entry):
            raise CorruptArtifact(f"{self.join(target)}: the copy does not match its source {source}")

    def probe(self) -> dict[str, bool | str]:
        """See Store. Runs once per process and bucket; writes and removes one small object."""
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

    # Shared with the product store

    def _is(self, key: str, entry: FileEntry) -> bool:
        found = self._head(key)
        if found is None or found["ContentLength"] != entry.size:
            return False
        return is_noted(found, entry) or self._read_back(key) == entry.sha256

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

    def _delete_keys(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            objects = [{"Key": self._full(key)} for key in keys[start : start + 1000]]
            with self._errors(keys[start]):
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
            if answer.get("Errors"):
                fault = answer["Errors"][0]
                raise StoreError(f"{self.uri}: cannot delete {fault.get('Key')}: {fault.get('Message')}")

    # Requests

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
