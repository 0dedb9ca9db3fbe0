"""A run's pointers: which product stands for each of its stages now, and which ones did before.

`runs/<run>/stages/<label>.json` is written when a stage is asked for, before its product is looked for or made: what a
run points at is not collected as garbage, and how far it got is found through it. Only the holder of the run's lease
moves a pointer: each one carries the token under which it was written, and a lower token never replaces a higher one.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from pydantic import ValidationError

from radlads.tasks.contracts.job import Sheet, first_fault
from radlads.tasks.contracts.locks.lease import Lease, LeaseLost
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import pointers_key, product_key

_POINTER_BYTES = 16 << 20
_ATTEMPTS = 5


class Target(Sheet):
    """A product that a run points at. time: since when; uri: where it lay then, for people (the key is `key`)."""

    stage: str
    digest: str
    uri: str
    time: datetime

    @property
    def key(self) -> str:
        """The product's prefix in the store."""
        return product_key(self.stage, self.digest)


class Pointer(Target):
    """`<label>.json`. older: what the stage was before, newest first; token: of the run's lease when it was written."""

    token: int
    older: tuple[Target, ...] = ()

    @property
    def targets(self) -> Iterator[Target]:
        """The product of now, then the older ones."""
        yield Target(stage=self.stage, digest=self.digest, uri=self.uri, time=self.time)
        yield from self.older


def pointer_key(run: str, label: str) -> str:
    """Where a pointer lies."""
    return f"{pointers_key(run)}/{label}.json"


def read_pointer(store: Store, run: str, label: str) -> Pointer | None:
    """What a stage of a run points at; None where the run has not asked for it. Raises StoreError."""
    found = store.read(pointer_key(run, label), limit=_POINTER_BYTES)
    return None if found is None else _parse(store, pointer_key(run, label), found[0])


def read_pointers(store: Store, run: str) -> dict[str, Pointer]:
    """Label → pointer of everything that a run has asked for. Raises StoreError."""
    prefix = pointers_key(run)
    labels = [key.removeprefix(f"{prefix}/").removesuffix(".json") for key in store.list(prefix)]
    found = {label: read_pointer(store, run, label) for label in labels}
    return {label: pointer for label, pointer in found.items() if pointer is not None}


def point(store: Store, run: str, label: str, stage: str, digest: str, lease: Lease) -> Pointer:
    """Have a run's stage point at a product; what it pointed at before joins its history.

    lease: on the run, held. Raises LeaseLost where another process makes the run by now, StoreError.
    """
    key = pointer_key(run, label)
    for _ in range(_ATTEMPTS):
        lease.check()
        found = store.read(key, limit=_POINTER_BYTES)
        before = None if found is None else _parse(store, key, found[0])
        if before is not None and before.token > lease.ref.token:
            raise LeaseLost(f"{store.join(key)} was written by another process, which makes the run '{run}' by now")
        if before is not None and (before.stage, before.digest) == (stage, digest):
            return before
        lease.confirm()
        after = _moved(store, before, stage, digest, lease.ref.token)
        data = after.model_dump_json(indent=1).encode() + b"\n"
        if store.put_if_absent(key, data) if found is None else store.replace(key, data, found[1]):
            return after
    raise StoreError(f"{store.join(key)}: others write it all the time; try again")


def write_history(store: Store, run: str, label: str, pointer: Pointer) -> None:
    """Write a pointer unless the run has one under this label: for a store that is converted."""
    store.put_if_absent(pointer_key(run, label), pointer.model_dump_json(indent=1).encode() + b"\n")


def _moved(store: Store, before: Pointer | None, stage: str, digest: str, token: int) -> Pointer:
    older = () if before is None else tuple(target for target in before.targets if target.digest != digest)
    uri = store.join(product_key(stage, digest))
    return Pointer(stage=stage, digest=digest, uri=uri, time=datetime.now(UTC), token=token, older=older)


def _parse(store: Store, key: str, data: bytes) -> Pointer:
    try:
        return Pointer.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(
            f"{store.join(key)} is not a pointer of this version ({first_fault(error)}): delete that file and run the "
            "recipe again, which finds every product that is there"
        ) from None
