"""What a run is about to do, said before it does it: which stages are reused, continued or new, and what that costs.

Digests of later stages follow from their specs and the digests of their inputs, so the graph itself, run by a runner
that only looks into the store, says all of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

from radlads.tasks.contracts.job import CodeVersion, Manifest
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.specs import StageSpec
from radlads.tasks.contracts.stages import PLAN
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.graph import Pending, Runner
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.plain_runner import Done
from radlads.tasks.plan_table import short_duration
from radlads.tasks.stage import Product

_log = logging.getLogger("prefect.radlads")
_STEP = re.compile(r"/checkpoints/step-(\d+)/manifest\.json$")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Outlook:
    """What is going to happen to a stage. made: the manifest of what is reused. step, steps: where it continues.
    seconds, gpu_hours, dollars: what it still takes by the plan; None where the plan does not know. product: its key in
    the store, which other runs may ask for as well."""

    label: str
    what: Literal["reused", "continued", "new"]
    product: str = ""
    made: Manifest | None = None
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    gpu_hours: float | None = None
    dollars: float | None = None

    def __str__(self) -> str:
        if self.made is not None:
            by = f" by run {self.made.run}" if self.made.run else ""
            return f"{self.label}: reused, made{by} on {self.made.created_at:%Y-%m-%d %H:%M}"
        at = f" from step {self.step:,} of {self.steps:,}" if self.what == "continued" else ""
        cost = _cost(self.seconds, self.gpu_hours, self.dollars)
        return f"{self.label}: {self.what}{at}{f', about {cost}' if cost else ''}"


def run_announced(pipeline: Pipeline, runner: Runner, graph: Callable[[Runner], _Made]) -> _Made:
    """Run a graph; once its plan is made, and before anything else is launched, log what is going to happen."""
    return graph(_Announcing(pipeline, runner, graph))


def outlook(pipeline: Pipeline, plan: Plan, graph: Callable[[Runner], object]) -> list[Outlook]:
    """What is going to happen to each stage of a graph, in order. Launches and writes nothing. Raises StoreError."""
    looking = _Looking(pipeline, plan)
    graph(looking)
    return looking.found


def describe(found: list[Outlook]) -> list[str]:
    """A line a stage, and one for all of them."""
    cost = cost_of(found)
    return [*map(str, found), f"in all: {counts_of(found)}{f'; about {cost} to go' if cost else ''}"]


def counts_of(found: Iterable[Outlook]) -> str:
    """ "2 reused, 0 continued, 3 new" """
    kinds = [one.what for one in found]
    return ", ".join(f"{kinds.count(what)} {what}" for what in ("reused", "continued", "new"))


def cost_of(found: Sequence[Outlook]) -> str:
    """What some stages take together, as far as the plan knows; "" where it knows nothing."""
    totals = [[getattr(one, name) for one in found] for name in ("seconds", "gpu_hours", "dollars")]
    return _cost(*(sum(value for value in values if value is not None) or None for values in totals))


class _Announcing:
    """A `Runner` that announces what another one is going to do."""

    def __init__(self, pipeline: Pipeline, runner: Runner, graph: Callable[[Runner], object]) -> None:
        self._pipeline, self._runner, self._graph = pipeline, runner, graph

    def plan(self, recipe: Recipe) -> Plan:
        """As Runner.plan."""
        plan = self._runner.plan(recipe)
        for line in describe(outlook(self._pipeline, plan, self._graph)):
            _log.info("%s", line)
        return plan

    def run(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None) -> Product:
        """As Runner.run."""
        return self._runner.run(stage, spec, inputs, label=label)

    def submit(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product]) -> Pending:
        """As Runner.submit."""
        return self._runner.submit(stage, spec, inputs)


class _Looking:
    """A `Runner` that makes nothing: it takes digests and looks what the store has of them."""

    def __init__(self, pipeline: Pipeline, plan: Plan) -> None:
        self._pipeline, self._plan = pipeline, plan
        self.found: list[Outlook] = []

    def plan(self, recipe: Recipe) -> Plan:
        """The plan, which is made already."""
        if self._plan.product.reused:
            self.found.append(Outlook(PLAN.name, "reused", made=self._plan.product.manifest))
        return self._plan

    def run(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None) -> Product:
        """The product that there is, or one with the digest that there will be."""
        request, store = self._pipeline.request(stage, spec, inputs), self._pipeline.store
        manifest = store.read_manifest(request.key)
        if manifest is not None:
            self.found.append(Outlook(label or stage, "reused", request.key, manifest))
        else:
            planned = self._plan.report.stages.get(stage, {})
            self.found.append(_ahead(label or stage, request.key, planned, _newest(store, request.key)))
            manifest = _expected(stage, request.digest)
        return Product(uri=store.join(request.key), manifest=manifest, reused=True)

    def submit(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product]) -> Done:
        """As run."""
        return Done(self.run(stage, spec, inputs))


def _ahead(label: str, product: str, planned: Mapping[str, object], step: int) -> Outlook:
    steps = planned.get("steps")
    steps = steps if isinstance(steps, int) else 0
    left = 1.0 - step / steps if steps else 1.0
    seconds, gpu_hours, dollars = (planned.get(name) for name in ("seconds", "gpu_hours", "dollars"))
    return Outlook(
        label,
        "continued" if step else "new",
        product,
        step=step,
        steps=steps,
        seconds=_share(seconds, left),
        gpu_hours=_share(gpu_hours, left),
        dollars=_share(dollars, left),
    )


def _share(cost: object, left: float) -> float | None:
    return cost * left if isinstance(cost, int | float) else None


def _newest(store: Store, key: str) -> int:
    """The step of the newest checkpoint; 0 without any."""
    found = (_STEP.search(place) for place in store.list(f"{key}/checkpoints"))
    return max((int(match.group(1)) for match in found if match), default=0)


def _expected(stage: str, digest: str) -> Manifest:
    """Stands for a product that is not made yet: later stages ask for its digest only."""
    code = CodeVersion(sha=None, versions={})
    return Manifest(stage=stage, digest=digest, spec={}, files=(), code=code, created_at=datetime.now(UTC))


def _cost(seconds: float | None, gpu_hours: float | None, dollars: float | None) -> str:
    parts = [] if gpu_hours is None else [f"{gpu_hours:,.1f} GPU hours"]
    parts += [f"{dollars:,.2f} dollars"] if dollars is not None else []
    return ", ".join(parts) or ("" if seconds is None else short_duration(seconds))
