"""When a product is reported as damaged: never after one response alone.

A response can be truncated or out of date while the stored content is intact. So the same wrong content must be read
twice, and the store's listing must agree with it; contradicting responses are reported as an error of the connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from radlads.tasks.contracts.job import FileEntry, Manifest
from radlads.tasks.contracts.store.errors import corrupt, unsteady
from radlads.tasks.contracts.store.names import place_of

PAUSES = (0.0, 0.3, 1.0, 3.0)
"""Seconds before each attempt to read an object that should exist."""


def prove_file(
    uri: str, entry: FileEntry, attempt: Callable[[], tuple[int, str] | None], listed: Callable[[], int | None]
) -> None:
    """Call attempt until the (size, sha256) that it read match the entry; it returns None if there is no file. uri: the
    product's. listed: returns the file's size in the store's current listing. Raises CorruptArtifact for damage,
    StoreError if the responses contradict each other.
    """
    seen: list[tuple[int, str] | None] = []
    for pause in PAUSES:
        time.sleep(pause)
        found = attempt()
        if found == (entry.size, entry.sha256):
            return
        if found in seen and listed() == (None if found is None else found[0]):
            raise corrupt(uri, f"{entry.path} {_fault(entry, found)}")
        seen.append(found)
    raise unsteady(uri, f"{entry.path} {_fault(entry, seen[-1])}")


def prove_listing(uri: str, prefix: str, manifest: Manifest, listing: Callable[[], Mapping[str, int]]) -> None:
    """Check that every file of a product is listed with its size. Raises CorruptArtifact if two listings agree on a
    fault, StoreError if they do not."""
    seen: list[str] = []
    for pause in PAUSES:
        time.sleep(pause)
        fault = _listed_fault(prefix, manifest.files, listing())
        if fault is None:
            return
        if fault in seen:
            raise corrupt(uri, fault)
        seen.append(fault)
    raise unsteady(uri, seen[-1])


def _listed_fault(prefix: str, files: Sequence[FileEntry], sizes: Mapping[str, int]) -> str | None:
    for entry in files:
        size = sizes.get(place_of(prefix, entry))
        if size != entry.size:
            found = "missing" if size is None else f"{size} bytes long"
            return f"{entry.path} is {found}, the manifest says {entry.size} bytes"
    return None


def _fault(entry: FileEntry, found: tuple[int, str] | None) -> str:
    if found is None:
        return "is missing"
    return "is altered (another sha256)" if found[0] == entry.size else f"is {found[0]} bytes long, not {entry.size}"
