"""All runs of a store."""

from __future__ import annotations

from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.files import parallel
from radlads.tasks.contracts.store.layout import check_layout, run_names
from radlads.tasks.look.run_state import RunState, look

_PARALLEL = 4
"""Each reads several objects at a time; a client of a bucket has 32 connections."""


def look_at_all(store: Store) -> list[RunState]:
    """The state of every run, the one that moved last at the end. Raises StoreError."""
    check_layout(store)
    names = run_names(store)
    found = parallel(lambda name: look(store, name, layout_checked=True), names, _PARALLEL) if names else []
    return sorted(found, key=lambda state: (state.moved.timestamp() if state.moved else 0.0, state.run))
