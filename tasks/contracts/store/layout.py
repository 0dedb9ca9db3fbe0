"""The layout of a store: products by digest; for each run its recipe and the pointers to its products.

<store>/layout                        the version of this layout
<store>/products/<stage>/<digest>/    files, job/, checkpoints/, lease.json, manifest.json (last)
<store>/runs/<run>/                   recipe.yaml, recipe-<digest>.yaml, lease.json,
                                      stages/<label>.json, judged/<stage>.json
<store>/sweeps/<sweep>/               sweep.yaml, table.md, table.json
"""

from __future__ import annotations

import re
from typing import Literal

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError

LAYOUT = 3
PRODUCTS, RUNS, DATASETS, SWEEPS = "products", "runs", "datasets", "sweeps"
_LAYOUT_KEY = "layout"
PointerKind = Literal["stages", "judged"]
"""stages: products of the run's own stages. judged: models of another run that it evaluates."""
# The earlier layout: products of a run's stages under runs/<run>/<stage>/, datasets in a folder of their own.
_FORMER = re.compile(r"(runs/[^/]+/(?!stages/)[^/]+|datasets/[^/]+)/(manifest\.json|job/|checkpoints/)")


def product_key(stage: str, digest: str) -> str:
    """The prefix of a product."""
    return f"{PRODUCTS}/{stage}/{digest}"


def run_key(run: str) -> str:
    """The prefix of a run's own files."""
    return f"{RUNS}/{run}"


def sweep_key(sweep: str) -> str:
    """The prefix of a sweep's own files; its runs lie with all other runs."""
    return f"{SWEEPS}/{sweep}"


def lease_key(prefix: str) -> str:
    """The lease on a product or on a run."""
    return f"{prefix}/lease.json"


def recipe_key(run: str) -> str:
    """The key of a run's recipe."""
    return f"{run_key(run)}/recipe.yaml"


def pointers_key(run: str, kind: PointerKind = "stages") -> str:
    """The prefix of a run's pointers."""
    return f"{run_key(run)}/{kind}"


def run_names(store: Store) -> list[str]:
    """The names of all runs in the store."""
    return sorted({key.split("/")[1] for key in store.list(RUNS) if key.count("/") > 1})


def former_keys(store: Store) -> list[str]:
    """The keys of the earlier layout that are still to be moved."""
    return [key for top in (RUNS, DATASETS) for key in store.list(top) if _FORMER.match(key)]


def check_layout(store: Store) -> None:
    """Raises UserError for a store of another layout. Writes nothing."""
    found = store.get_bytes(_LAYOUT_KEY)
    if found is None:
        if former_keys(store):
            raise UserError(
                f"{store.uri} has the layout of an earlier version (products under runs/ and datasets/): "
                f"convert it first (files are linked, not copied): radlads store upgrade --store {store.uri}"
            )
    elif found.strip() != str(LAYOUT).encode():
        shown = ascii(found[:20].decode(errors="replace"))
        raise UserError(f"{store.uri} has layout {shown}, this version reads {LAYOUT}; use the version that made it")


def claim_layout(store: Store) -> None:
    """As check_layout, for whoever is about to write: a new store is marked with this layout. Raises StoreError."""
    check_layout(store)
    mark_layout(store)


def mark_layout(store: Store) -> None:
    """Write the layout's mark. Raises StoreError."""
    if not store.put_if_absent(_LAYOUT_KEY, f"{LAYOUT}\n".encode()) and store.get_bytes(_LAYOUT_KEY) is None:
        raise StoreError(f"{store.join(_LAYOUT_KEY)} was written but cannot be read")
