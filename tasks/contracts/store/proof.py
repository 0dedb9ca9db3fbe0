"""When a product may be called damaged: never on one answer alone.

An answer can be cut short or out of date while what is stored is whole. So the same wrong content must come twice, and
the store's own listing must agree with it; whatever contradicts itself is an error of the way there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from radlads.tasks.contracts.job import FileEntry, Manifest
from radlads.tasks.contracts.store.errors import corrupt, unsteady
from radlads.tasks.contracts.store.names import place_of

PAUSES = (0.0, 0.3, 1.0, 3.0)
"""Seconds before each attempt at reading something that should be there."""


def prove_file(
    uri: str, entry: FileEntry, attempt: Callable[[], tuple[int, str] | None], listed: Callable[[], int | None]
) -> None:
    """Call attempt until the (size, sha256) that it read are the entry's; it returns None where nothing is.

    uri: the product's. listed: the file's size as the store lists it now. Raises CorruptArtifact for damage, StoreError
    where the answers contradict each other.
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
    """Check that every file of a product is listed with its size. Raises CorruptArtifact where two listings agree on a
    fault, StoreError where they do not."""
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
