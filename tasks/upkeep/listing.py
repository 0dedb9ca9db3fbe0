"""The contents of a store: its runs with their pointers, and all products, with or without a pointer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.layout import PRODUCTS, lease_key, product_key, run_names
from radlads.tasks.contracts.store.names import MANIFEST
from radlads.tasks.contracts.store.pointers import Pointer, read_pointers


@dataclass(frozen=True)
class StoredProduct:
    """A product in the store. size: bytes of all its files, checkpoints and record included. committed: whether it has
    a manifest; otherwise it is unfinished."""

    stage: str
    digest: str
    size: int
    committed: bool

    @property
    def key(self) -> str:
        """Its prefix in the store."""
        return product_key(self.stage, self.digest)


@dataclass(frozen=True)
class StoredRun:
    """A run and its pointers, by label. judged: those at models of another run that it evaluates, by stage."""

    name: str
    pointers: dict[str, Pointer]
    judged: dict[str, Pointer]

    def keys(self, *, history: bool) -> Iterator[str]:
        """Keys of the products that it points at; history: also of its earlier ones."""
        for pointer in (*self.pointers.values(), *self.judged.values()):
            yield from (target.key for target in pointer.targets if history or target.digest == pointer.digest)


def stored_products(store: Store) -> list[StoredProduct]:
    """Everything under products/, from one listing. Raises StoreError."""
    sizes: dict[tuple[str, str], int] = {}
    committed: set[tuple[str, str]] = set()
    for key, size in store.sizes(PRODUCTS).items():
        parts = key.split("/")
        if len(parts) < 4 or key == lease_key("/".join(parts[:3])):  # a deleted product keeps its lease
            continue
        place = (parts[1], parts[2])
        sizes[place] = sizes.get(place, 0) + size
        if parts[3:] == [MANIFEST]:
            committed.add(place)
    return [StoredProduct(*place, size, place in committed) for place, size in sorted(sizes.items())]


def stored_runs(store: Store) -> list[StoredRun]:
    """Every run of the store. Raises StoreError."""
    return [
        StoredRun(name, read_pointers(store, name), read_pointers(store, name, "judged")) for name in run_names(store)
    ]


def age_of(store: Store, product: StoredProduct) -> float:
    """Seconds since it was committed, or last worked on; by the store's clock, 0 where that is unknown."""
    if product.committed:
        return store.age(f"{product.key}/{MANIFEST}") or 0.0
    keys = (lease_key(product.key), f"{product.key}/job/log.txt", *store.list(product.key)[:1])
    return next((age for age in map(store.age, keys) if age is not None), 0.0)
