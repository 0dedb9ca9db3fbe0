"""Garbage collection: lists the products that no run points at, and deletes them on request.

A run writes its pointer before it looks for a product, and reuses no product whose lease is held. A collector takes the
lease first and reads the pointers after that. So if a run and a collector use the same product, at least one sees the
other; the second one waits or skips it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.locks.lease import LeaseHeld, is_live, product_lease
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.layout import check_layout, lease_key, run_key
from radlads.tasks.upkeep.listing import StoredProduct, age_of, stored_products, stored_runs

_DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Garbage:
    """A product that no kept run points at. runs: other runs that do. kept: the reason why it was not deleted; empty if
    it was deleted, or would be."""

    product: StoredProduct
    age_seconds: float
    runs: tuple[str, ...]
    kept: str = ""


@dataclass(frozen=True)
class Wish:
    """Which products to keep. runs: names, or None for all. history: also their earlier products. older_than_days:
    collect only products older than this."""

    runs: Collection[str] | None = None
    history: bool = True
    older_than_days: float = 0.0


def find_garbage(store: Store, wish: Wish) -> list[Garbage]:
    """Products that no kept run points at and no process makes. Raises UserError for a kept run that does not exist."""
    check_layout(store)
    kept, others = _pointed(store, wish)
    found = []
    for product in stored_products(store):
        if product.key in kept or is_live(store, product.key):
            continue
        age = age_of(store, product)
        if age >= wish.older_than_days * _DAY_SECONDS:
            found.append(Garbage(product, age, tuple(sorted(others.get(product.key, ())))))
    return found


def collect(store: Store, wish: Wish, work: Path) -> Iterator[Garbage]:
    """Delete the garbage, one product after the other; a product that is in use again is kept, with the reason in
    `kept`. work: the folder of this process, shown to others. Raises UserError, StoreError.
    """
    for garbage in find_garbage(store, wish):
        product, why = garbage.product, ""
        if is_live(store, product.key):
            why = "it is being made again"
        else:
            try:
                with product_lease(store, product.stage, product.digest, work, deleting=True) as lease:
                    if product.key in _pointed(store, wish)[0]:
                        why = "a run points at it now"
                    else:
                        lease.confirm()
                        # The lease stays: its token must not start again while a suspended writer may return.
                        store.delete(product.key, keep=[lease_key(product.key)])
            except LeaseHeld as held:
                why = f"it is being {held.by}"
        yield Garbage(product, garbage.age_seconds, garbage.runs, why)


def _pointed(store: Store, wish: Wish) -> tuple[set[str], dict[str, set[str]]]:
    """Keys that kept runs point at; key → other runs that do. A running run is always kept."""
    runs = stored_runs(store)
    unknown = set(wish.runs or ()) - {run.name for run in runs}
    if unknown:
        raise UserError(f"there is no run {', '.join(map(repr, sorted(unknown)))} in {store.uri}: nothing is deleted")
    kept: set[str] = set()
    others: dict[str, set[str]] = {}
    for run in runs:
        if wish.runs is None or run.name in wish.runs or is_live(store, run_key(run.name)):
            kept.update(run.keys(history=wish.history))
        else:
            for key in run.keys(history=True):
                others.setdefault(key, set()).add(run.name)
    return kept, others
