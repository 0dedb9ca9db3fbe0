"""run_stage with an MLflow run, reported progress, and exclusive use of the GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from radlads.tasks.contracts.job import JobResources, TrackingRef
from radlads.tasks.contracts.specs import StageSpec, TokenizeSpec
from radlads.tasks.contracts.stages import Stage, stage_info
from radlads.tasks.contracts.store.open import StoreError
from radlads.tasks.contracts.tracking import close_run, open_stage_run, run_url
from radlads.tasks.launchers.stopping import REQUEST
from radlads.tasks.mirror import kept_stage, mirror_stage
from radlads.tasks.mirrored.params import stage_params
from radlads.tasks.observe import ProgressView, gpu_slot, show_link
from radlads.tasks.pipeline import Pipeline
from radlads.tasks.stage import Product, StageRequest, run_stage


def perform(
    pipeline: Pipeline, stage: Stage, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None
) -> Product:
    """Run a stage of the pipeline inside a Prefect task. label: its display name, for a stage that a run has several
    times.

    Raises what run_stage raises.
    """
    label = label or stage
    request = pipeline.request(stage, spec, inputs)
    opened: list[TrackingRef] = []

    def open_tracking(digest: str) -> TrackingRef | None:
        params = stage_params(pipeline.recipe, stage, request.spec.model_dump(mode="json"))
        parent = pipeline.tracked()
        ref = open_stage_run(parent, pipeline.run, label, digest, params=params) if parent is not None else None
        if ref is None:
            pipeline.behind = pipeline.behind or bool(pipeline.settings.tracking)
            return None
        opened.append(ref)
        show_link(pipeline.run, f"{label}-mlflow", run_url(ref), f"{label} in MLflow")
        return ref

    try:
        product = run_stage(
            request,
            open_tracking=open_tracking,
            on_progress=ProgressView(pipeline.run, label).show,
            slot=gpu_slot(
                pipeline.settings.gpu_limit,
                pipeline.launcher,
                _computes_on(pipeline, stage, spec),
                f"{label} of {pipeline.run}",
            ),
        )
    except BaseException:
        if opened:
            _mirror(pipeline, request, opened[0])
        raise
    _mirror(pipeline, request, None)
    return product


def _mirror(pipeline: Pipeline, request: StageRequest, failed: TrackingRef | None) -> None:
    """Bring MLflow up to date with a stage in the store. The store determines how the stage ended, not this process:
    another one may have made the product. failed: the MLflow run to close if the store has no ending."""
    if not pipeline.settings.tracking or pipeline.is_lost:
        return
    parent = pipeline.tracked()
    kept = None
    with suppress(StoreError, OSError):  # a fault of the store is reported by the job itself
        kept = kept_stage(pipeline.store, request.key)
    if (
        parent is not None
        and kept is not None
        and mirror_stage(pipeline.store, parent, kept, pipeline.run, pipeline.recipe)
    ):
        if kept.ending is not None:
            return
    else:
        pipeline.behind = True
    close_run(failed, "KILLED" if REQUEST.asked_at is not None else "FAILED")


def _computes_on(pipeline: Pipeline, stage: Stage, spec: StageSpec) -> JobResources:
    """The device of the stage's job. Tokenizing needs more than the CPU only if it samples from a teacher."""
    samples = isinstance(spec, TokenizeSpec) and spec.teacher is not None
    if samples or stage_info(stage).uses_device:
        return pipeline.resources
    return pipeline.resources.model_copy(update={"device": "cpu"})
