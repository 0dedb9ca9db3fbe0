"""One pipeline run: its recipe, its name, its store, and the parent MLflow run of its stages."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import identity, readings
from radlads.tasks.contracts.job import SCHEMA_VERSION, InputRef, TrackingRef, first_fault
from radlads.tasks.contracts.locks.lease import Lease, held_by, run_lease
from radlads.tasks.contracts.locks.scratch_lock import hold_folder
from radlads.tasks.contracts.mirrors.weights_biases import is_wandb, wandb_ref
from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.packaged import at_fetched_teacher
from radlads.tasks.contracts.pins.pins import at_pinned_commits, moved_content
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe, recipe_of_data
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
from radlads.tasks.contracts.settings import Settings, check_run_name, refuse_credentials, resolve_settings
from radlads.tasks.contracts.specs import Pin, PlanReport, PlanSpec, StageSpec
from radlads.tasks.contracts.stages import PLAN, STUDENT_STAGES, TRAINING_STAGES, Stage
from radlads.tasks.contracts.store.layout import check_layout, claim_layout, recipe_key
from radlads.tasks.contracts.store.open import Store, StoreError, find_store, open_store, store_id
from radlads.tasks.contracts.store.pointers import Target, point, read_pointer, read_pointers
from radlads.tasks.contracts.tracking import Ending, RunIdentity, close_run, open_pipeline_run
from radlads.tasks.launchers.launcher import Launcher
from radlads.tasks.launchers.registry import find_launcher
from radlads.tasks.launchers.stopping import REQUEST, RunStopped
from radlads.tasks.look.record import keep_places, keep_recipe, unknown_run
from radlads.tasks.look.stop_request import StopWatch
from radlads.tasks.mirror import sync_run
from radlads.tasks.mirrored.params import run_params
from radlads.tasks.stage import Product, StageRequest, product_held

_log = logging.getLogger(__name__)
_TRY_AGAIN_SECONDS = 60.0


class Pipeline:
    """State shared by the stages of a run. Not a dataclass: the orchestrator would traverse it at every call.

    parent: the MLflow run of the whole pipeline; None if there is none yet. behind: MLflow lacks part of this run.
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
        self.launcher = launcher or find_launcher(recipe.resources)
        self.resources = self.launcher.resources(recipe.resources)

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken over this run: then this one must not change its state in MLflow."""
        return self.lease is not None and self.lease.is_lost

    def tracked(self) -> TrackingRef | None:
        """The MLflow run of the whole pipeline, opened at first use; None without MLflow. After an outage it is retried
        at intervals."""
        uri = self.settings.tracking
        if is_wandb(uri) and self.parent is None:
            folder, identity = str(self.settings.home / "wandb"), (store_id(self.store), self.run)
            self.parent = wandb_ref(uri, folder, self.recipe.name, self.run, *identity)
        if self.parent is None and uri and time.monotonic() - self._tried_at >= _TRY_AGAIN_SECONDS:
            self._tried_at = time.monotonic()
            self.parent = open_pipeline_run(
                uri,
                self.recipe.name,
                RunIdentity(store=store_id(self.store), run=self.run),
                params=run_params(self.recipe),
                tags={"radlads.store": self.store.uri, "mlflow.note.content": self.recipe.description},
            )
            self.behind = self.behind or self.parent is None
        return self.parent

    def request(self, stage: Stage, spec: StageSpec, inputs: Mapping[str, Product]) -> StageRequest:
        """The request to run_stage for a stage of this run."""
        refs: dict[str, InputRef] = {name: product.ref for name, product in inputs.items()}
        return StageRequest(
            stage=stage,
            run=self.run,
            recipe=self.recipe.name,
            spec=spec,
            inputs=refs,
            store=self.store,
            resources=self.resources,
            work=self.settings.work,
            lease=self.lease,
            grace_seconds=self.settings.grace_seconds,
            content_cache=self.settings.content_cache,
            launcher=self.launcher,
        )

    def plan_spec(self, requested: Recipe) -> PlanSpec:
        """The spec of the run's plan of a recipe.

        An earlier plan of the run is reused if it was made from this recipe and the contents of the named places are
        unchanged, even if files have moved. A new plan keeps the hub commits that earlier ones pinned. Raises
        UserError.
        """
        earlier = list(plans_of(self.store, self.run))
        hashes = ContentHashes(self.settings.content_cache)
        recipe = requested
        for _, report in earlier:
            recipe = _at_moving_commits(recipe, report.pins)
        for spec, report in earlier:
            again = PlanSpec(recipe=recipe, run=self.run, contents=spec.contents)
            if identity(again, None) == identity(spec, None) and not moved_content(requested, report, hashes):
                return again
        contents = moved_content(requested, earlier[0][1], hashes) if earlier else {}
        return PlanSpec(recipe=recipe, run=self.run, contents=contents)


@dataclass(frozen=True)
class Plan:
    """The plan's product, and its report, which pins the inputs of later specs."""

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
    """Check the recipe, then open the store and MLflow; close the MLflow run when the block ends.

    During the block no other process can make the run, neither one that uses the same store nor one on this machine.
    recipe: its name, its file, or a recipe with its overrides applied. run: the run's name; by default the recipe's
    name and the first part of `run_id`, which must be the same if the run is retried. launcher: replaces the recipe's.
    Raises UserError, such as LeaseHeld.
    """
    refuse_credentials(store=store, tracking=tracking)
    if isinstance(recipe, Recipe):
        requested = recipe
    else:
        requested = anchor_recipe(load_recipe(recipe, overrides), recipe, Path.cwd())
    name = check_run_name(f"{requested.name}-{run_id[:8]}" if run is None else run)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    with file_errors(f"the work folder {settings.work}"):
        settings.work.mkdir(parents=True, exist_ok=True, mode=0o700)
    pipeline = Pipeline(at_fetched_teacher(requested, settings.home), name, settings, launcher)
    claim_layout(pipeline.store)
    pipeline.launcher.check(pipeline.store, settings.work)
    folder = settings.work / "runs" / name
    with (
        run_lease(pipeline.store, name, folder) as lease,
        hold_folder(folder, "lock", what=f"the folder of run '{name}'"),
        StopWatch(pipeline.store, name, lease),
    ):
        pipeline.lease = lease
        keep_recipe(pipeline.store, name, pipeline.recipe, lease)
        keep_places(pipeline.store, name, settings)
        pipeline.tracked()
        try:
            yield pipeline
        except BaseException as error:
            stopped = isinstance(error, RunStopped) or not isinstance(error, Exception)
            _close(pipeline, "KILLED" if stopped else "FAILED")
            raise
        _close(pipeline, "FINISHED")


def _close(pipeline: Pipeline, ending: Ending) -> None:
    """Record in MLflow how the run ended, and send entries that it missed in an outage."""
    if pipeline.is_lost:
        return
    closed = close_run(pipeline.parent, ending)
    if not (pipeline.behind or not closed) or REQUEST.asked_at is not None:  # a stopped run does not wait
        return
    try:
        sync_run(pipeline.store, pipeline.settings.tracking, pipeline.run)
        close_run(pipeline.tracked(), ending)
    except (UserError, StoreError) as error:
        _log.warning("%s; `radlads sync %s` does that", error, pipeline.run)


def recipe_of_run(run: str, overrides: Mapping[str, Any] | None = None, *, store: str | None = None) -> Recipe:
    """The recipe of a run, with the hub commits of teacher and data that its plan pinned.

    store: as of open_pipeline. Raises UserError.
    """
    place = find_store(resolve_settings(store=store).store)
    check_layout(place)
    data = place.get_bytes(recipe_key(check_run_name(run)))
    if data is None:
        raise unknown_run(place, run)
    where = f"the recipe of run '{run}'"
    requested = anchor_recipe(recipe_of_data(data, overrides, where=where), where, Path.cwd())
    plan = next(plans_of(place, run), None)
    return requested if plan is None else at_pinned_commits(requested, plan[1].pins)


def plans_of(store: Store, run: str) -> Iterator[tuple[PlanSpec, PlanReport]]:
    """The finished plans of a run that this version can read, the newest first. Raises StoreError."""
    pointer = read_pointer(store, run, PLAN.name)
    for target in pointer.targets if pointer is not None else ():
        manifest = store.read_manifest(target.key)
        if manifest is not None and manifest.schema_version == SCHEMA_VERSION:
            try:
                spec = PlanSpec.model_validate(manifest.spec)
                report = PlanReport.model_validate_json(store.read_file(target.key, "plan.json"))
            except ValidationError as error:
                _log.warning("%s is of another version and is skipped: %s", target.key, first_fault(error))
                continue
            yield spec, report


def _at_moving_commits(recipe: Recipe, pins: Mapping[str, Pin]) -> Recipe:
    """The recipe with the pinned commits for all hub places that it names without a revision."""
    revisions = {reading.location: reading.revision for reading in readings(recipe)}
    return at_pinned_commits(recipe, {place: pin for place, pin in pins.items() if revisions.get(place, "") is None})


def students_to_judge(pipeline: Pipeline, run: str) -> dict[str, Product]:
    """finished_students of another run. The pipeline's run points at them, so that they are not collected as garbage
    before they are read; waits for a collector that deletes one. Raises UserError, RunStopped, StoreError.
    """
    store, lease = pipeline.store, pipeline.lease
    if lease is None:
        raise ValueError("only the holder of a run's lease can point at products")

    def look() -> None:
        REQUEST.check()
        lease.check()

    students = finished_students(store, run)
    for stage, product in students.items():
        target = point(store, pipeline.run, stage, stage, product.manifest.digest, lease, "judged")
        if held_by(store, target.key) is not None:
            with product_held(store, stage, target.digest, pipeline.settings.work, pipeline.run, look):
                pass
        if store.read_manifest(target.key) is None:
            raise UserError(
                f"'{stage}' of the run '{run}' was deleted in the meantime; run its recipe again to make it"
            )
    return students


def finished_students(store: Store, run: str) -> dict[str, Product]:
    """Stage → model of a run, each made from the one before. Raises UserError if there are none. For a run whose
    settings changed, it is the chain that ends in the newest model; other models of earlier settings, and a last one of
    a stage that the recipe no longer has, are left out.
    """
    check_layout(store)
    dropped = _dropped_stages(store, run)
    pointers = [p for p in read_pointers(store, check_run_name(run)).values() if p.stage in STUDENT_STAGES]
    made: dict[str, Product] = {}
    for pointer in pointers:
        product = None if pointer.stage in dropped else _committed(store, pointer)
        if product is not None:
            made[pointer.digest] = product
    if not made:
        raise UserError(f"there is no finished model of a run '{run}' in {store.uri}")
    pointed = {pointer.digest: pointer.time for pointer in pointers}
    read = {_student_of(product) for product in made.values()}
    last = max((digest for digest in made if digest not in read), key=lambda digest: pointed[digest])
    chain = [made[last]]
    # The pointer of an earlier stage may have moved on to a product of new settings that does not exist yet.
    targets = {target.digest: target for pointer in pointers for target in pointer.targets}
    while (digest := _student_of(chain[0])) is not None:
        before = _committed(store, targets[digest]) if digest in targets else None
        if before is None:
            made_of = f"the model {digest[:12]}, from which '{chain[0].manifest.stage}' of the run '{run}' was made"
            _log.warning("%s, is no longer in %s: it is not evaluated", made_of, store.uri)
            break
        chain.insert(0, before)
    return {product.manifest.stage: product for product in chain}


def _committed(store: Store, target: Target) -> Product | None:
    manifest = store.read_manifest(target.key)
    return None if manifest is None else Product(uri=store.join(target.key), manifest=manifest, reused=True)


def _dropped_stages(store: Store, run: str) -> set[str]:
    """Training stages that the run's recipe does not have, or no longer."""
    data = store.get_bytes(recipe_key(run))
    try:
        recipe = None if data is None else recipe_of_data(data, None, where=f"the recipe of run '{run}'")
    except UserError as error:
        _log.warning("%s: all models of the run are taken for its own", error)
        recipe = None
    return set() if recipe is None else {stage for stage in TRAINING_STAGES if getattr(recipe, stage) is None}


def _student_of(product: Product) -> str | None:
    """The digest of the model from which a model was made."""
    student = product.manifest.inputs.get("student")
    return None if student is None else student.digest
