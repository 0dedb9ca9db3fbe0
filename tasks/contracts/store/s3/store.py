"""Products in an S3 bucket.

This code verifies each upload (by an ETag that can only be the MD5 of the content sent, or else by reading it back),
and readers hash their downloads.

A file is stored under its own name. Nothing is overwritten before the commit: if an unfinished attempt left other
content under that name, the file goes to `.objects/<sha256>` instead. After the commit no other attempt can commit, and
the committed content is copied to the name (`settle`), for readers that do not use the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.manager import TransferManager

from radlads.tasks.contracts.job import FileEntry, Manifest, StoreRef
from radlads.tasks.contracts.store.errors import CorruptArtifact, StoreError
from radlads.tasks.contracts.store.files import Block, parallel, read_blocks, regroup
from radlads.tasks.contracts.store.names import OBJECTS, check_key, place_of
from radlads.tasks.contracts.store.s3.client import MISSING, TAKEN, code_of, make_client
from radlads.tasks.contracts.store.s3.copy import copy_noted
from radlads.tasks.contracts.store.s3.multipart import upload_parts
from radlads.tasks.contracts.store.s3.objects import PART_BYTES, S3Objects
from radlads.tasks.contracts.store.s3.probe import abort_unfinished_uploads
from radlads.tasks.contracts.store.s3.seal import Seal, part_size, seal_blocks, seal_file

_log = logging.getLogger(__name__)


class _KeyTaken(Exception):  # noqa: N818
    """Another writer completed this key first."""


class S3Store(S3Objects):
    """Keys live under `s3://bucket/prefix`. Credentials come from the SDK's own chain, never from us."""

    def __init__(self, ref: StoreRef, *, part_bytes: int = PART_BYTES) -> None:
        super().__init__(ref, part_bytes=part_bytes)
        # Product uploads use a separate client, whose multipart uploads complete only if the key does not exist.
        self._writer = make_client(ref)
        self._writer.meta.events.register(
            "before-parameter-build.s3.CompleteMultipartUpload", self._complete_only_if_absent
        )

    def _upload(self, prefix: str, name: str, path: Path) -> FileEntry:
        size, natural, sent = path.stat().st_size, f"{prefix}/{name}", None
        part = part_size(size, self._part_bytes)
        if size > self._part_bytes and self._head(natural) is None:
            sent = self._send_sealing(natural, path, part)
        seal = seal_file(path, part) if sent is None else sent
        entry = FileEntry(path=name, size=seal.size, sha256=seal.sha256)
        # An unfinished attempt may have left other content at the path, and a slow one may still be writing there:
        # nothing is overwritten, the file goes to a key named by its content instead.
        for candidate in (entry, entry.model_copy(update={"stored_as": f"{OBJECTS}/{seal.sha256}"})):
            key = place_of(prefix, candidate)
            holds = self._holds(key, seal)
            if holds is None:
                self._send(key, path, seal)
                holds = self._holds(key, seal)
            if holds:
                return candidate
        raise CorruptArtifact(f"{self.join(key)}: the upload does not match its source ({path.name})")

    def put_blocks(self, key: str, blocks: Sequence[Block]) -> FileEntry:
        """See Store. Uploaded once more if the endpoint does not hold what was sent."""
        size = sum(memoryview(block).nbytes for block in blocks)
        part = part_size(size, self._part_bytes)
        for _ in range(2):
            parts = regroup(blocks, part)
            with self._errors(key):
                if size > self._part_bytes:
                    seal = upload_parts(self._client, self._place(key), parts, part)
                else:
                    data = b"".join(parts)
                    seal = seal_blocks([data], part)
                    self._put(key, data)
            if self._holds(key, seal):
                return FileEntry(path=key, size=seal.size, sha256=seal.sha256)
        raise CorruptArtifact(f"{self.join(key)}: the upload does not match its source")

    def settle(self, prefix: str, manifest: Manifest) -> None:
        """See Store."""
        for entry in manifest.files:
            if entry.stored_as is not None:
                try:
                    self._settle(prefix, entry)
                except StoreError as error:  # readers that use the manifest are not affected
                    _log.warning("%s still holds another attempt's %s: %s", self.join(prefix), entry.path, error)

    def _settle(self, prefix: str, entry: FileEntry) -> None:
        """Copy the committed content to its own name, on the server; if that fails, delete the object under that name.

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

    def _send(self, key: str, path: Path, seal: Seal) -> None:
        """Upload unless another writer's object exists by then; the caller checks the result with _holds."""
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

    def _send_sealing(self, key: str, path: Path, part: int) -> Seal | None:
        """As _send, of a large file that is read once: its seal is made on the way. None: another writer's exists."""
        with self._errors(key):
            try:
                return upload_parts(self._writer, self._place(key), read_blocks(path, part), part)
            except _KeyTaken:
                return None
            except ClientError as error:
                if code_of(error) not in TAKEN:
                    raise
        return None

    def _complete_only_if_absent(self, params: dict[str, Any], **_: Any) -> None:
        """Botocore event before a multipart upload completes. Raises _KeyTaken."""
        if self.probe()["conditional_multipart"]:
            params["IfNoneMatch"] = "*"
        elif self._head_full(params["Key"]) is not None:
            raise _KeyTaken(params["Key"])

    def _holds(self, key: str, seal: Seal) -> bool | None:
        """Whether the object matches the seal; None if there is no object."""
        found = self._head(key)
        if found is None:
            return None
        if found["ContentLength"] != seal.size:
            return False
        return found["ETag"].strip('"') in seal.etags or self._read_back(key) == seal.sha256

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

    def _tidy(self, prefix: str) -> None:
        """Abort unfinished multipart uploads: once a prefix is committed, no other writer can commit there."""
        try:
            abort_unfinished_uploads(self._client, self.bucket, self._full(prefix) + "/")
        except (ClientError, BotoCoreError) as error:
            _log.warning("%s: unfinished uploads could not be aborted: %s", self.join(prefix), error)
