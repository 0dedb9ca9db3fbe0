"""The announcement at the start of a run: which stages are reused, continued or new, and their estimated cost.

The digest of a stage follows from its spec and the digests of its inputs. So the graph can be run by a runner that only
reads the store, which yields every digest.
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
    """How a run will handle one stage. made: the manifest of a reused product. step, steps: where a stage continues.
    seconds, gpu_hours, dollars: the remaining cost by the plan; None if the plan has no estimate. product: its key in
    the store, which other runs may share."""

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
        return f"{self.label}: {self.what}{at}{f', about {self.cost}' if self.cost else ''}"

    @property
    def cost(self) -> str:
        """ "10.0 GPU hours, 25.00 dollars", as far as the plan has estimates."""
        return _cost(self.seconds, self.gpu_hours, self.dollars)


Approval = Callable[[list[Outlook]], Callable[[str], None]]


def run_announced(
    pipeline: Pipeline, runner: Runner, graph: Callable[[Runner], _Made], approve: Approval | None = None
) -> _Made:
    """Run a graph; after its plan is made, and before any other stage is launched, log the announcement.

    approve: given the announcement, makes what is called with each stage's label before that stage, and may wait.
    """
    return graph(_Announcing(pipeline, runner, graph, approve))


def outlook(pipeline: Pipeline, plan: Plan, graph: Callable[[Runner], object]) -> list[Outlook]:
    """The outlook of each stage of a graph, in order. Launches and writes nothing. Raises StoreError."""
    looking = _Looking(pipeline, plan)
    graph(looking)
    return looking.found


def describe(found: list[Outlook]) -> list[str]:
    """One line per stage, and one for the total."""
    cost = cost_of(found)
    return [*map(str, found), f"in all: {counts_of(found)}{f'; about {cost} to go' if cost else ''}"]


def counts_of(found: Iterable[Outlook]) -> str:
    """ "2 reused, 0 continued, 3 new" """
    kinds = [one.what for one in found]
    return ", ".join(f"{kinds.count(what)} {what}" for what in ("reused", "continued", "new"))


def cost_of(found: Sequence[Outlook]) -> str:
    """The total cost of some stages, as far as the plan has estimates; "" if it has none."""
    totals = [[getattr(one, name) for one in found] for name in ("seconds", "gpu_hours", "dollars")]
    return _cost(*(sum(value for value in values if value is not None) or None for values in totals))


class _Announcing:
    """A `Runner` that logs the announcement, then passes each stage to another runner."""

    def __init__(
        self, pipeline: Pipeline, runner: Runner, graph: Callable[[Runner], object], approval: Approval | None
    ) -> None:
        self._pipeline, self._runner, self._graph, self._approval = pipeline, runner, graph, approval
        self._approve: Callable[[str], None] = lambda _: None

    def plan(self, recipe: Recipe) -> Plan:
        """As Runner.plan."""
        plan = self._runner.plan(recipe)
        found = outlook(self._pipeline, plan, self._graph)
        for line in describe(found):
            _log.info("%s", line)
        if self._approval is not None:
            self._approve = self._approval(found)
        return plan

    def run(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None) -> Product:
        """As Runner.run."""
        self._approve(label or stage)
        return self._runner.run(stage, spec, inputs, label=label)

    def submit(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product]) -> Pending:
        """As Runner.submit."""
        self._approve(stage)
        return self._runner.submit(stage, spec, inputs)


class _Looking:
    """A `Runner` that runs no jobs: it computes digests and looks them up in the store."""

    def __init__(self, pipeline: Pipeline, plan: Plan) -> None:
        self._pipeline, self._plan = pipeline, plan
        self.found: list[Outlook] = []

    def plan(self, recipe: Recipe) -> Plan:
        """The existing plan."""
        if self._plan.product.reused:
            self.found.append(Outlook(PLAN.name, "reused", made=self._plan.product.manifest))
        return self._plan

    def run(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None) -> Product:
        """The existing product, or a placeholder with the digest that it will have."""
        request, store = self._pipeline.request(stage, spec, inputs), self._pipeline.store
        manifest = store.read_manifest(request.key)
        if manifest is not None:
            self.found.append(Outlook(label or stage, "reused", request.key, manifest))
        else:
            planned = self._plan.report.stages.get(label or stage, {})
            self.found.append(_ahead(label or stage, request.key, planned, _newest(store, request.key)))
            manifest = _expected(stage, request.digest)
        return Product(uri=store.join(request.key), manifest=manifest, reused=True)

    def submit(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product]) -> Done:
        """As run, wrapped as a stage that has ended."""
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
    """The step of the newest checkpoint; 0 if there is none."""
    found = (_STEP.search(place) for place in store.list(f"{key}/checkpoints"))
    return max((int(match.group(1)) for match in found if match), default=0)


def _expected(stage: str, digest: str) -> Manifest:
    """A placeholder for a product that does not exist yet: later stages use its digest only."""
    code = CodeVersion(sha=None, versions={})
    return Manifest(stage=stage, digest=digest, spec={}, files=(), code=code, created_at=datetime.now(UTC))


def _cost(seconds: float | None, gpu_hours: float | None, dollars: float | None) -> str:
    parts = [] if gpu_hours is None else [f"{gpu_hours:,.1f} GPU hours"]
    parts += [f"{dollars:,.2f} dollars"] if dollars is not None else []
    return ", ".join(parts) or ("" if seconds is None else short_duration(seconds))
