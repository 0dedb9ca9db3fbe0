"""Runs the stages of a graph in this process, one after the other, without an orchestrator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import follow_moves
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.specs import PlanReport, StageSpec
from radlads.tasks.contracts.stages import PLAN
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.stage import Product, StageRequest, run_stage


@dataclass(frozen=True)
class StageRun:
    """A stage that has ended. label: its display name. seconds: its duration, close to 0 if it was reused."""

    label: str
    request: StageRequest
    product: Product
    seconds: float


@dataclass(frozen=True)
class Done:
    """A submitted stage; it has already ended."""

    product: Product

    def result(self) -> Product:
        """Its product."""
        return self.product


class PlainRunner:
    """A `Runner` (graph.py). It neither writes to MLflow nor waits for GPUs: the caller has exclusive use of the
    machine.

    on_done: called after every stage.
    """

    def __init__(self, pipeline: Pipeline, on_done: Callable[[StageRun], None] = lambda _: None) -> None:
        self._pipeline = pipeline
        self._on_done = on_done

    def plan(self, recipe: Recipe) -> Plan:
        """As Runner.plan."""
        product = self.run(PLAN.name, self._pipeline.plan_spec(recipe), {})
        return Plan(product=product, report=read_plan(self._pipeline, product))

    def run(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None) -> Product:
        """As Runner.run."""
        began = time.monotonic()
        request = self._pipeline.request(stage, spec, inputs)
        product = run_stage(request)
        self._on_done(StageRun(label or stage, request, product, time.monotonic() - began))
        return product

    def submit(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product]) -> Done:
        """As Runner.submit; the stage has ended when this returns."""
        return Done(self.run(stage, spec, inputs))


def read_plan(pipeline: Pipeline, product: Product) -> PlanReport:
    """The report of a plan's product, with the places that the recipe names now. Raises UserError if the content of one
    of them is not the planned one."""
    key = pipeline.store.key(product.uri)
    report = PlanReport.model_validate_json(pipeline.store.read_file(key, "plan.json"))
    return follow_moves(pipeline.recipe, report, ContentHashes(pipeline.settings.content_cache))
