"""Opens a store: a folder or any S3 endpoint, with the same behaviour. See store/base.py for the commit protocol."""

from __future__ import annotations

import uuid
from pathlib import Path

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import CommitConflict, CorruptArtifact, StoreError, StoreUnusable
from radlads.tasks.contracts.store.local import LocalStore

__all__ = [
    "CommitConflict",
    "CorruptArtifact",
    "LocalStore",
    "Store",
    "StoreError",
    "StoreUnusable",
    "find_store",
    "open_store",
    "store_id",
]


def open_store(ref: StoreRef) -> Store:
    """Open a store by its uri: `s3://bucket/prefix`, or a folder. Raises StoreUnusable."""
    if ref.uri.startswith("s3://"):
        from radlads.tasks.contracts.store.s3.store import S3Store  # boto3 takes a quarter of a second

        return S3Store(ref)
    if "://" in ref.uri and not ref.uri.startswith("file://"):
        raise StoreUnusable(f"the store {ref.uri} is neither s3://bucket/prefix nor a folder")
    return LocalStore(ref)


def find_store(ref: StoreRef) -> Store:
    """As open_store, for whoever only looks: a folder that is not there is not made. Raises StoreUnusable."""
    if not ref.uri.startswith("s3://") and not Path(ref.uri.removeprefix("file://")).expanduser().exists():
        raise StoreUnusable(f"there is no store at {ref.uri}: `radlads run` makes it; --store names another one")
    return open_store(ref)


def store_id(store: Store) -> str:
    """The store's unique id, which also distinguishes folders with the same path on two machines. Kept in the store
    itself, so that it moves with it. Raises StoreError."""
    key = "store-id"
    known = store.get_bytes(key)
    if known is None:
        store.put_if_absent(key, uuid.uuid4().hex.encode())
        known = store.get_bytes(key)  # another process may have been first
    if known is None:
        raise StoreError(f"{store.join(key)} was written but cannot be read")
    return known.decode(errors="replace").strip()
