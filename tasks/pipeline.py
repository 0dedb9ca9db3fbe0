"""One pipeline run: its recipe, its name, where its products go, and the MLflow run above all its stages."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import SCHEMA_VERSION, InputRef, TrackingRef
from radlads.tasks.contracts.locks.lease import Lease
from radlads.tasks.contracts.locks.scratch_lock import hold_folder
from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.pins.pins import at_pinned_commits
from radlads.tasks.contracts.recipe.recipe import Recipe, dump_recipe, load_recipe, recipe_of_data
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
from radlads.tasks.contracts.settings import Settings, check_run_name, refuse_credentials, resolve_settings
from radlads.tasks.contracts.specs import PlanReport, StageSpec
from radlads.tasks.contracts.stages import STUDENT_STAGES, Stage, stage_info
from radlads.tasks.contracts.store.open import Store, StoreError, open_store, store_id
from radlads.tasks.contracts.tracking import Ending, RunIdentity, close_run, open_pipeline_run
from radlads.tasks.launchers.launcher import Launcher
from radlads.tasks.launchers.registry import find_launcher
from radlads.tasks.launchers.stopping import REQUEST, RunStopped
from radlads.tasks.mirror import recipe_params, sync_run
from radlads.tasks.stage import Product, StageRequest

_log = logging.getLogger(__name__)
_TRY_AGAIN_SECONDS = 60.0


class Pipeline:
    """What every stage of a run shares. Not a dataclass: the orchestrator would walk through it at every call.

    parent: the MLflow run of the whole pipeline; None while there is none. behind: MLflow lacks something of this run.
    """

    def __init__(self, recipe: Recipe, run: str, settings: Settings, launcher: Launcher | None = None) -> None:
        self.recipe = recipe
        self.run = run
        self.settings = settings
        self.parent: TrackingRef | None = None
        self.lease: Lease | None = None
        self.behind = False
        self._tried_at = -math.inf
        self.store = open_store(settings.store)
        self.launcher = launcher or find_launcher(recipe.resources.launcher)
        self.resources = self.launcher.resources(recipe.resources)

    @property
    def is_lost(self) -> bool:
        """Whether another process makes this run by now: what is known of it elsewhere is no longer ours to change."""
        return self.lease is not None and self.lease.is_lost

    def tracked(self) -> TrackingRef | None:
        """The MLflow run of the whole pipeline, opened when first asked for; None without MLflow. After an outage it is
        tried again now and then."""
        if self.parent is None and self.settings.tracking and time.monotonic() - self._tried_at >= _TRY_AGAIN_SECONDS:
            self._tried_at = time.monotonic()
            self.parent = open_pipeline_run(
                self.settings.tracking,
                self.recipe.name,
                RunIdentity(store=store_id(self.store), run=self.run),
                params=recipe_params(self.recipe),
                tags={"radlads.store": self.store.uri},
            )
            self.behind = self.behind or self.parent is None
        return self.parent

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
            content_cache=self.settings.content_cache,
            launcher=self.launcher,
        )
        if not stage_info(stage).shared:
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
    recipe: str | Recipe,
    *,
    overrides: Mapping[str, Any] | None = None,
    run: str | None = None,
    run_id: str,
    store: str | None = None,
    tracking: str | None = None,
    work: str | None = None,
    launcher: Launcher | None = None,
) -> Iterator[Pipeline]:
    """Check the recipe first of all, then open the store and MLflow, and close the MLflow run as the block ends.

    While the block runs, no other process makes the run: neither one that reaches the store, nor one on this machine.
    recipe: its name, its file, or itself, with its overrides applied. run: the run's name; by default the recipe's name
    and the first part of `run_id`, which must be the same when the run is retried. launcher: instead of the
    one that the recipe names. Raises UserError, such as RunHeld.
    """
    refuse_credentials(store=store, tracking=tracking)
    if isinstance(recipe, Recipe):
        asked = recipe
    else:
        asked = anchor_recipe(load_recipe(recipe, overrides), recipe, Path.cwd())
    name = check_run_name(f"{asked.name}-{run_id[:8]}" if run is None else run)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    with file_errors(f"the work folder {settings.work}"):
        settings.work.mkdir(parents=True, exist_ok=True, mode=0o700)
    pipeline = Pipeline(asked, name, settings, launcher)
    folder = settings.work / name
    with Lease(pipeline.store, name, folder) as lease, hold_folder(folder, "lock", what=f"the folder of run '{name}'"):
        pipeline.lease = lease
        _keep_recipe(pipeline)
        pipeline.tracked()
        try:
            yield pipeline
        except BaseException as error:
            stopped = isinstance(error, RunStopped) or not isinstance(error, Exception)
            _close(pipeline, "KILLED" if stopped else "FAILED")
            raise
        _close(pipeline, "FINISHED")


def _close(pipeline: Pipeline, ending: Ending) -> None:
    """Say in MLflow how the run ended, with whatever an outage has kept from it."""
    if pipeline.is_lost:
        return
    told = close_run(pipeline.parent, ending)
    if not (pipeline.behind or not told) or REQUEST.asked_at is not None:  # whoever stopped it does not wait for this
        return
    try:
        sync_run(pipeline.store, pipeline.settings.tracking, pipeline.run)
        close_run(pipeline.tracked(), ending)
    except (UserError, StoreError) as error:
        _log.warning("%s; `radlads sync %s` does that", error, pipeline.run)


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


def recipe_of_run(run: str, overrides: Mapping[str, Any] | None = None, *, store: str | None = None) -> Recipe:
    """The recipe that a run was made by, with its teacher and its data of the hub at the commits that its plan pinned.

    store: as of open_pipeline. Raises UserError.
    """
    place = open_store(resolve_settings(store=store).store)
    data = place.get_bytes(f"runs/{check_run_name(run)}/recipe.yaml")
    if data is None:
        raise UserError(f"there is no run '{run}' in {place.uri}")
    where = f"the recipe of run '{run}'"
    asked = anchor_recipe(recipe_of_data(data, overrides, where=where), where, Path.cwd())
    manifest = place.read_manifest(f"runs/{run}/plan")
    if manifest is None or manifest.schema_version != SCHEMA_VERSION:
        return asked  # nothing was pinned that this version can read
    report = PlanReport.model_validate_json(place.read_file(f"runs/{run}/plan", "plan.json"))
    return at_pinned_commits(asked, report.pins)


def finished_students(store: Store, run: str) -> dict[str, Product]:
    """Stage → model of a run, in the stages' order. Raises UserError where it has none."""
    check_run_name(run)
    found = {}
    for stage in STUDENT_STAGES:
        key = f"runs/{run}/{stage}"
        manifest = store.read_manifest(key)
        if manifest is not None:
            found[stage] = Product(uri=store.join(key), manifest=manifest, reused=True)
    if not found:
        raise UserError(f"there is no finished model of a run '{run}' in {store.uri}")
    return found
