"""A run's pointers: the current product of each of its stages, and the earlier ones.

`runs/<run>/stages/<label>.json` is written when a stage starts, before its product is looked up or made. So the product
is not collected as garbage, and the progress of an unfinished stage can be found. An evaluation points at the models of
the other run in the same way, under `judged/`: they are kept as long as its folder exists. Only the holder of the run's
lease moves a pointer: each pointer carries the token under which it was written, and a lower token never replaces a
higher one.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from pydantic import ValidationError

from radlads.tasks.contracts.job import Sheet, first_fault
from radlads.tasks.contracts.locks.lease import Lease, LeaseLost
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import PointerKind, pointers_key, product_key

_POINTER_BYTES = 16 << 20
_ATTEMPTS = 5


class Target(Sheet):
    """A product that a run points at. time: since when; uri: its address at that time, for display only (see `key`)."""

    stage: str
    digest: str
    uri: str
    time: datetime

    @property
    def key(self) -> str:
        """The product's prefix in the store."""
        return product_key(self.stage, self.digest)


class Pointer(Target):
    """`<label>.json`. older: earlier products, newest first; token: of the run's lease when it was written."""

    token: int
    older: tuple[Target, ...] = ()

    @property
    def targets(self) -> Iterator[Target]:
        """The current product, then the older ones."""
        yield Target(stage=self.stage, digest=self.digest, uri=self.uri, time=self.time)
        yield from self.older


def pointer_key(run: str, label: str, kind: PointerKind = "stages") -> str:
    """The key of a pointer."""
    return f"{pointers_key(run, kind)}/{label}.json"


def read_pointer(store: Store, run: str, label: str, kind: PointerKind = "stages") -> Pointer | None:
    """The pointer of a run's stage; None if the run has not reached it. Raises StoreError."""
    key = pointer_key(run, label, kind)
    found = store.read(key, limit=_POINTER_BYTES)
    return None if found is None else _parse(store, key, found[0])


def read_pointers(store: Store, run: str, kind: PointerKind = "stages") -> dict[str, Pointer]:
    """Label → pointer of every stage that a run has reached, or of every model that it judges. Raises StoreError."""
    prefix = pointers_key(run, kind)
    labels = [key.removeprefix(f"{prefix}/").removesuffix(".json") for key in store.list(prefix)]
    found = {label: read_pointer(store, run, label, kind) for label in labels}
    return {label: pointer for label, pointer in found.items() if pointer is not None}


def point(
    store: Store, run: str, label: str, stage: str, digest: str, lease: Lease, kind: PointerKind = "stages"
) -> Pointer:
    """Point a run's stage at a product; the previous product joins the pointer's history.

    lease: on the run, held. Raises LeaseLost if another process has taken over the run, StoreError.
    """
    key = pointer_key(run, label, kind)
    for _ in range(_ATTEMPTS):
        lease.check()
        found = store.read(key, limit=_POINTER_BYTES)
        before = None if found is None else _parse(store, key, found[0])
        if before is not None and before.token > lease.ref.token:
            raise LeaseLost(f"{store.join(key)} was written by another process, which has taken over the run '{run}'")
        if before is not None and (before.stage, before.digest) == (stage, digest):
            return before
        lease.confirm()
        after = _moved(store, before, stage, digest, lease.ref.token)
        data = after.model_dump_json(indent=1).encode() + b"\n"
        if store.put_if_absent(key, data) if found is None else store.replace(key, data, found[1]):
            return after
    raise StoreError(f"{store.join(key)}: other processes keep writing it; try again")


def write_history(store: Store, run: str, label: str, pointer: Pointer) -> None:
    """Write a pointer unless the run has one under this label: for the conversion of a store."""
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
            "recipe again, which reuses all existing products"
        ) from None
