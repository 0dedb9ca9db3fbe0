"""Garbage: products that no run points at. Listed, and deleted where that is asked for.

A run writes its pointer before it looks for a product, and reuses no product whose lease is held. A collector takes the
lease first and looks at the pointers after that. So of a run and a collector that want the same product, at least one
sees the other, and whoever comes second waits or leaves it alone.
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
    """A product that no kept run points at. runs: others that do. kept: why it is left alone all the same, where it
    was about to be deleted; empty for what is gone, or would go."""

    product: StoredProduct
    age_seconds: float
    runs: tuple[str, ...]
    kept: str = ""


@dataclass(frozen=True)
class Wish:
    """What is kept. runs: names, or None for all. history: also what these pointed at before. older_than_days: of what
    is not kept, only that."""

    runs: Collection[str] | None = None
    history: bool = True
    older_than_days: float = 0.0


def find_garbage(store: Store, wish: Wish) -> list[Garbage]:
    """Products that no kept run points at and nobody makes. Raises UserError for a kept run that there is none of."""
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
    """Delete the garbage, one product after the other; what was wanted again meanwhile is left alone and says so.

    work: where this process works, for others to read. Raises UserError, StoreError.
    """
    for garbage in find_garbage(store, wish):
        product, why = garbage.product, ""
        if is_live(store, product.key):
            why = "it is being made again"
        else:
            try:
                with product_lease(store, product.stage, product.digest, work, deleting=True) as lease:
                    if product.key in _pointed(store, wish)[0]:
                        why = "a run points at it by now"
                    else:
                        lease.confirm()
                        # The lease stays: its token must not begin anew under a writer that was away.
                        store.delete(product.key, keep=[lease_key(product.key)])
            except LeaseHeld as held:
                why = f"it is being {held.by}"
        yield Garbage(product, garbage.age_seconds, garbage.runs, why)


def _pointed(store: Store, wish: Wish) -> tuple[set[str], dict[str, set[str]]]:
    """Keys that kept runs point at; key → other runs that do. A run that is at work is kept whatever is wished."""
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
