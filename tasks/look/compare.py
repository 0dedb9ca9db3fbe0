"""Runs side by side: what differs in their recipes, then in what was found, with errors, then in what it took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.parsing.yaml_reader import read_yaml
from radlads.tasks.contracts.stages import JUDGING_STAGES, PLAN, STAGES
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.files import parallel
from radlads.tasks.contracts.store.layout import check_layout
from radlads.tasks.contracts.store.pointers import Pointer, read_pointers
from radlads.tasks.look.record import read_recipe
from radlads.tasks.look.results import Score, gpu_hours_of, heldout_losses, hours_of, scores_of
from radlads.tasks.look.run_state import read_planned

_JUDGES = (*JUDGING_STAGES, "data")
_NOTHING = object()
SURE = 2.0
"""Standard errors from which a difference is called one."""


@dataclass(frozen=True)
class Difference:
    """A second run's number less the first's. stderr: as if both were found independently, which is more than the true
    one where the same texts were read; None without errors. is_better: of the second; None if that is not known."""

    value: float
    stderr: float | None
    is_better: bool | None

    @property
    def is_sure(self) -> bool | None:
        """Whether it is larger than two standard errors; None without errors."""
        return None if self.stderr is None else abs(self.value) > SURE * self.stderr


@dataclass
class Comparison:
    """recipe: dotted key → its value in each run, None where a run has none; keys alike in all are left out. results,
    took: heading → the number of each run, or None. shared: labels of stages whose product all runs share."""

    runs: list[str]
    recipe: dict[str, list[Any]] = field(default_factory=dict)
    results: dict[str, list[Score | None]] = field(default_factory=dict)
    took: dict[str, list[float | None]] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)

    @property
    def judged_alike(self) -> bool:
        """Whether no key about the judges or the data differs."""
        return not any(key.split(".")[0] in _JUDGES for key in self.recipe)

    def difference(self, heading: str) -> Difference | None:
        """Of the last run from the first; None where one of them has no such number."""
        first, last = self.results[heading][0], self.results[heading][-1]
        if first is None or last is None:
            return None
        value = last.value - first.value
        error = None if first.stderr is None or last.stderr is None else math.hypot(first.stderr, last.stderr)
        direction = first.more_is_better
        return Difference(value, error, None if direction is None or not value else (value > 0) == direction)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        results = {
            heading: [None if one is None else {"value": one.value, "stderr": one.stderr} for one in scores]
            for heading, scores in self.results.items()
        }
        differences = {}
        for heading in self.results:
            if len(self.runs) == 2 and (found := self.difference(heading)) is not None:
                differences[heading] = vars(found) | {"is_sure": found.is_sure}
        return {"runs": self.runs, "recipe": self.recipe, "results": results, "difference": differences,
                "took": self.took, "shared": self.shared, "judged_alike": self.judged_alike}  # fmt: skip


def compare(store: Store, runs: Sequence[str]) -> Comparison:
    """Compare two or more runs of a store. Raises UserError, StoreError."""
    if len(set(runs)) < 2:
        raise UserError("name two or more different runs, e.g. radlads compare first second; `radlads runs` lists them")
    if len(set(runs)) != len(runs):
        raise UserError(f"'{next(run for run in runs if list(runs).count(run) > 1)}' is named twice")
    check_layout(store)
    found = Comparison(list(runs))
    recipes = [dict(_flat(read_yaml(read_recipe(store, run), where=f"the recipe of '{run}'"))) for run in runs]
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [recipe.get(key, _NOTHING) for recipe in recipes]
        if any(value != values[0] for value in values):
            found.recipe[key] = [None if value is _NOTHING else value for value in values]
    pointers = parallel(lambda run: read_pointers(store, run), list(runs))
    made = parallel(lambda of_run: _made(store, of_run), pointers)
    scores = [[*scores_of(one), *heldout_losses(one)] for one in made]
    for heading in dict.fromkeys(score.heading for of_run in scores for score in of_run):
        found.results[heading] = [next((s for s in of_run if s.heading == heading), None) for of_run in scores]
    _add_costs(store, found, pointers, made)
    labels = [label for label in made[0] if all(label in one for one in made)]
    found.shared = [label for label in labels if len({one[label].digest for one in made}) == 1]
    return found


def _made(store: Store, pointers: Mapping[str, Pointer]) -> dict[str, Manifest]:
    """Label → what a run has finished, in the order of the stages."""
    order = list(STAGES)
    labels = sorted(pointers, key=lambda label: (order.index(pointers[label].stage), label))
    found = {label: store.read_manifest(pointers[label].key) for label in labels}
    return {label: manifest for label, manifest in found.items() if manifest is not None}


def _add_costs(
    store: Store,
    found: Comparison,
    pointers: Sequence[Mapping[str, Pointer]],
    made: Sequence[Mapping[str, Manifest]],
) -> None:
    """What the products of each run took, whoever made them: so runs that share some are compared fairly."""
    rows: dict[str, list[float | None]] = {"job hours": [], "GPU hours": [], "trained tokens": []}
    for of_run, products in zip(pointers, made, strict=True):
        all_of_them = [manifest for label, manifest in products.items() if label != PLAN.name]
        tokens = [float(m.metrics["tokens"]) for m in all_of_them if "tokens" in m.metrics and "loss" in m.metrics]
        rows["job hours"].append(hours_of(all_of_them))
        rows["GPU hours"].append(gpu_hours_of(all_of_them, read_planned(store, of_run)))
        rows["trained tokens"].append(sum(tokens) if tokens else None)
    found.took = {name: values for name, values in rows.items() if any(value is not None for value in values)}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key → value; lists of plain values are one value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{prefix}.{number}")
    else:
        yield prefix, value
