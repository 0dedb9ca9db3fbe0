"""One pipeline run: its recipe, its name, where its products go, and the MLflow run above all its stages."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radlads.tasks.anchor import anchor_recipe
from radlads.tasks.job import InputRef, Stage, TrackingRef, UserError
from radlads.tasks.launch import machine_resources
from radlads.tasks.lease import Lease
from radlads.tasks.recipe import Recipe, dump_recipe, load_recipe
from radlads.tasks.scratch_lock import hold_folder
from radlads.tasks.settings import Settings, resolve_settings
from radlads.tasks.specs import PlanReport, StageSpec
from radlads.tasks.stage import Product, StageRequest
from radlads.tasks.store import open_store
from radlads.tasks.tracking import close_run, open_pipeline_run

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Pipeline:
    """What every stage of a run shares. Not a dataclass: the orchestrator would walk through it at every call.

    parent: the MLflow run of the whole pipeline; None without MLflow.
    """

    def __init__(self, recipe: Recipe, run: str, settings: Settings, parent: TrackingRef | None) -> None:
        self.recipe = recipe
        self.run = run
        self.settings = settings
        self.parent = parent
        self.lease: Lease | None = None
        self.store = open_store(settings.store)
        self.resources = machine_resources(recipe.resources)

    @property
    def is_lost(self) -> bool:
        """Whether another process makes this run by now: what is known of it elsewhere is no longer ours to change."""
        return self.lease is not None and self.lease.is_lost

    def request(self, stage: Stage, spec: StageSpec, inputs: Mapping[str, Product]) -> StageRequest:
        """A stage of this run, as run_stage wants it. Datasets are shared between runs, the rest is the run's own."""
        refs: dict[str, InputRef] = {name: product.ref for name, product in inputs.items()}
        request = StageRequest(
            stage=stage,
            run=self.run,
            recipe=self.recipe.name,
            spec=spec,
            inputs=refs,
            output_key=f"runs/{self.run}/{stage}",
            store=self.store,
            resources=self.resources,
            scratch=self.settings.work / self.run / stage,
            lease=self.lease,
            grace_seconds=self.settings.grace_seconds,
        )
        if stage != "tokenize":
            return request
        digest = request.digest
        return StageRequest(
            **{**vars(request), "output_key": f"datasets/{digest}", "scratch": self.settings.work / "datasets" / digest}
        )


@dataclass(frozen=True)
class Plan:
    """The plan's product, and its report, which later specs are pinned to."""

    product: Product
    report: PlanReport


@contextmanager
def open_pipeline(
    recipe: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    run: str | None = None,
    run_id: str,
    store: str | None = None,
    tracking: str | None = None,
    work: str | None = None,
) -> Iterator[Pipeline]:
    """Check the recipe first of all, then open the store and MLflow, and close the MLflow run as the block ends.

    While the block runs, no other process makes the run: neither one that reaches the store, nor one on this machine.
    run: the run's name; by default the recipe's name and the first part of `run_id`, which must be the same when the
    run is retried. Raises UserError, RunHeld among them.
    """
    asked = load_recipe(recipe, overrides)
    asked = anchor_recipe(asked, recipe, Path.cwd())
    name = run or f"{asked.name}-{run_id[:8]}"
    if not _RUN_NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot be a run's name: letters, digits, '.', '_' and '-', at most 128 of them")
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    pipeline = Pipeline(asked, name, settings, None)
    folder = settings.work / name
    with Lease(pipeline.store, name, folder) as lease, hold_folder(folder, "lock", what=f"the folder of run '{name}'"):
        pipeline.lease = lease
        _keep_recipe(pipeline)
        with _tracked(pipeline):
            yield pipeline


@contextmanager
def _tracked(pipeline: Pipeline) -> Iterator[None]:
    """The MLflow run above all stages, closed as the block ends; left alone where another process has taken over."""
    if pipeline.settings.tracking:
        pipeline.parent = open_pipeline_run(
            pipeline.settings.tracking,
            pipeline.recipe.name,
            pipeline.run,
            params=pipeline.recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
            tags={"radlads.store": pipeline.store.uri},
        )
    try:
        yield
    finally:
        error = sys.exception()
        ended = error is None
        stopped = error is not None and not isinstance(error, Exception)
        if not pipeline.is_lost:
            close_run(pipeline.parent, "FINISHED" if ended else "KILLED" if stopped else "FAILED")


def _keep_recipe(pipeline: Pipeline) -> None:
    """The resolved recipe beside the products, written once; a changed one, as far as its changes are allowed within
    a run, is kept under a name of its own."""
    data = dump_recipe(pipeline.recipe).encode()
    first = f"runs/{pipeline.run}/recipe.yaml"
    known = pipeline.store.get_bytes(first)
    if known is None:
        pipeline.store.put_if_absent(first, data)
    elif known != data:
        digest = hashlib.sha256(data).hexdigest()[:12]
        pipeline.store.put_if_absent(f"runs/{pipeline.run}/recipe-{digest}.yaml", data)


def finished_students(pipeline: Pipeline, run: str) -> dict[str, Product]:
    """Stage → model of another run in the same store, in the stages' order. Raises UserError where it has none."""
    found = {}
    for stage in ("transplant", "align", "choose", "distill", "finetune"):
        key = f"runs/{run}/{stage}"
        manifest = pipeline.store.read_manifest(key) if _RUN_NAME.fullmatch(run) else None
        if manifest is not None:
            found[stage] = Product(uri=pipeline.store.join(key), manifest=manifest, reused=True)
    if not found:
        raise UserError(f"there is no finished model of a run '{run}' in {pipeline.store.uri}")
    return found
