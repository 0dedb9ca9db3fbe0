"""Brings MLflow up to date with a run in the store: its products, and the record of every job.

MLflow is a mirror and may have been unreachable for any length of time. Its missing entries are determined by querying
it, so a repeated update adds nothing.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef, JobSpec, Manifest, TrackingRef
from radlads.tasks.contracts.metrics_record import catch_up
from radlads.tasks.contracts.mirrors.weights_biases import is_wandb
from radlads.tasks.contracts.parsing.yaml_reader import read_yaml
from radlads.tasks.contracts.recipe.recipe import Recipe, parse_recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.contracts.stages import JUDGING_STAGES, MODEL_STAGES, PLAN, PUBLISH, STAGES, TOKENIZE
from radlads.tasks.contracts.store.layout import check_layout, recipe_key
from radlads.tasks.contracts.store.open import Store, store_id
from radlads.tasks.contracts.store.pointers import read_pointers
from radlads.tasks.contracts.tracking import (
    Ending,
    RunIdentity,
    add_params,
    open_pipeline_run,
    open_stage_run,
    settle_run,
)
from radlads.tasks.mirrored.inputs import show_inputs, show_model
from radlads.tasks.mirrored.params import planned_params, run_params, stage_params
from radlads.tasks.mirrored.products import link_product, mirror_product
from radlads.tasks.mirrored.weights_biases import show_product
from radlads.tasks.stage import restore_record

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptStage:
    """The state of a product in the store, once its job has begun. manifest: None until it is committed. run: the run
    that made it."""

    key: str
    run: str
    stage: str
    digest: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, InputRef]
    manifest: Manifest | None
    reason: str | None
    """How its last job ended."""

    @property
    def label(self) -> str:
        """Its display name."""
        return f"{self.stage} {self.spec['name']}" if self.stage == TOKENIZE.name else self.stage

    @property
    def ending(self) -> Ending | None:
        """The status as MLflow names it; None while it may be running."""
        if self.manifest is not None:
            return "FINISHED"
        return None if self.reason is None else "KILLED" if self.reason == "preempted" else "FAILED"


def sync_run(store: Store, uri: str, run: str) -> list[str]:
    """Send MLflow everything that it lacks of a run; returns the labels of the stages, in order.

    uri: MLflow's. Raises UserError if the store has no such run or MLflow cannot be updated.
    """
    if is_wandb(uri):
        raise UserError("W&B keeps what it could not send in .radlads/wandb: wandb sync --sync-all sends it")
    check_layout(store)
    kept = list(kept_stages(store, run))
    if not kept:
        raise UserError(f"there is no run '{run}' in {store.uri}")
    experiment, recipe = _recipe(store, run)
    identity = RunIdentity(store=store_id(store), run=run)
    params = {} if recipe is None else run_params(recipe)
    parent = open_pipeline_run(uri, experiment, identity, params=params, running=False)
    if parent is None or not all(mirror_stage(store, parent, one, run, recipe) for one in kept):
        raise UserError(f"MLflow at {uri} could not be brought up to date with '{run}'; try again when it answers")
    ended = _ending(kept)
    if ended is not None:
        settle_run(parent, ended)
    return [one.label for one in kept]


def mirror_stage(store: Store, parent: TrackingRef, kept: KeptStage, run: str, recipe: Recipe | None) -> bool:
    """Send MLflow everything that it lacks of one stage of a run; returns whether it is complete now. For a product of
    another run a link to that run's numbers is shown. recipe: the run's, as far as this version can read it."""
    if kept.run != run:
        return (
            kept.manifest is None
            or is_wandb(parent.uri)
            or link_product(parent, kept.label, store.join(kept.key), kept.manifest)
        )
    params = stage_params(recipe, kept.stage, kept.spec)
    if is_wandb(parent.uri):
        return _to_wandb(store, parent, kept, run, recipe, params)
    ref = open_stage_run(parent, run, kept.label, kept.digest, params=params, running=False)
    if ref is None:
        return False
    with tempfile.TemporaryDirectory(prefix="radlads-record-") as folder:
        restore_record(store, kept.key, Path(folder))
        whole = catch_up(Path(folder, "metrics.jsonl"), ref)
    whole &= show_inputs(ref, kept.inputs, kept.spec)
    if kept.manifest is not None:
        uri = store.join(kept.key)
        whole &= mirror_product(parent, ref, kept.label, uri, kept.manifest)
        whole &= show_model(ref, run, uri, kept.manifest)
        if kept.stage == PLAN.name:
            whole &= add_params(parent, _planned(store, kept.key))
    if kept.ending is not None:
        whole &= settle_run(ref, kept.ending, kept.manifest.created_at if kept.manifest else None)
    return whole


def _to_wandb(
    store: Store, parent: TrackingRef, kept: KeptStage, run: str, recipe: Recipe | None, params: Mapping[str, Any]
) -> bool:
    ref = open_stage_run(parent, run, kept.label, kept.digest)
    if kept.manifest is None or ref is None:
        return True
    config = {} if recipe is None else run_params(recipe)
    return show_product(parent, ref, kept.label, store.join(kept.key), kept.manifest, config, params)


def kept_stages(store: Store, run: str) -> Iterator[KeptStage]:
    """The state of every product that a run points at, in the order of the stages."""
    order = list(STAGES)
    pointers = sorted(read_pointers(store, run).items(), key=lambda item: (order.index(item[1].stage), item[0]))
    for _, pointer in pointers:
        kept = kept_stage(store, pointer.key)
        if kept is not None:
            yield kept


def kept_stage(store: Store, key: str) -> KeptStage | None:
    """The state of a product in the store; None if no job has begun it."""
    manifest = store.read_manifest(key)
    data = store.get_bytes(f"{key}/job/job.json")
    begun: JobSpec | Manifest | None = manifest
    if begun is None and data is not None:
        with suppress(ValidationError):  # a job.json of another version without a product
            begun = JobSpec.model_validate_json(data)
    if begun is None:
        return None
    return KeptStage(
        key=key,
        run=begun.run,
        stage=begun.stage,
        digest=begun.digest,
        spec=begun.spec,
        inputs=begun.inputs,
        manifest=manifest,
        reason=_reason(store, key),
    )


def _ending(kept: list[KeptStage]) -> Ending | None:
    """How a run ended, inferred from its stages: it is finished once it has published, or evaluated if it only does
    that."""
    made = {one.stage for one in kept if one.manifest is not None}
    whole = len(made) == len({one.stage for one in kept})
    judged = made.isdisjoint(MODEL_STAGES) and not made.isdisjoint(JUDGING_STAGES)
    if PUBLISH.name in made or (whole and judged):
        return "FINISHED"
    return next((one.ending for one in kept if one.ending in ("FAILED", "KILLED")), None)


def _planned(store: Store, key: str) -> dict[str, Any]:
    try:
        return planned_params(PlanReport.model_validate_json(store.read_file(key, "plan.json")))
    except ValidationError:  # of another version
        return {}


def _recipe(store: Store, run: str) -> tuple[str, Recipe | None]:
    """The name of a run's recipe, which is its experiment in MLflow, and the recipe if this version can read it."""
    data = store.get_bytes(recipe_key(run))
    if data is None:
        raise UserError(f"the run '{run}' in {store.uri} has no recipe.yaml")
    raw = read_yaml(data, where=f"recipe.yaml of '{run}'")
    try:
        recipe = parse_recipe(raw, where=f"recipe.yaml of '{run}'")
    except UserError as error:  # of another version of the project; only its name is needed
        _log.warning("the parameters of '%s' are not sent to MLflow: %s", run, error)
        return str(raw.get("name") if isinstance(raw, dict) else run), None
    return recipe.name, recipe


def _reason(store: Store, key: str) -> str | None:
    data = store.get_bytes(f"{key}/job/exit.json")
    with suppress(ValueError, AttributeError):
        return str(json.loads(data)["reason"]) if data else None
    return None
