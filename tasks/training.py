"""align, distill, finetune, and pretrain: the same job with four objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from radlads.tasks.job import UserError
from radlads.tasks.perform import perform, stage_task
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.prepare import planned_teacher
from radlads.tasks.recipe import Training
from radlads.tasks.section_memory import mlp_bits, teacher_bits
from radlads.tasks.specs import TrainSpec
from radlads.tasks.stage import Product


@stage_task("align")
def align(pipeline: Pipeline, plan: Plan, data: Mapping[str, Product], student: Product) -> Product:
    """Stage 1: every mixer learns what the attention that it replaces puts out."""
    return _train(pipeline, "align", plan, data, student)


@stage_task("distill")
def distill(pipeline: Pipeline, plan: Plan, data: Mapping[str, Product], student: Product) -> Product:
    """Stage 2: the student learns the teacher's logits."""
    return _train(pipeline, "distill", plan, data, student)


@stage_task("finetune")
def finetune(pipeline: Pipeline, plan: Plan, data: Mapping[str, Product], student: Product) -> Product:
    """Stage 3: the student learns the text itself."""
    return _train(pipeline, "finetune", plan, data, student)


@stage_task("pretrain")
def pretrain(pipeline: Pipeline, plan: Plan, data: Mapping[str, Product]) -> Product:
    """Make a small teacher from nothing."""
    return _train(pipeline, "pretrain", plan, data, None)


def _train(
    pipeline: Pipeline,
    stage: Literal["align", "distill", "finetune", "pretrain"],
    plan: Plan,
    data: Mapping[str, Product],
    student: Product | None,
) -> Product:
    section: Training | None = getattr(pipeline.recipe, stage)
    if section is None:
        raise UserError(f"the recipe '{pipeline.recipe.name}' has no section `{stage}`")
    # The finetune stage needs no teacher; naming one in its digest would tie it to what it does not use.
    teacher = planned_teacher(plan) if stage in ("align", "distill") else None
    bits = {"teacher_bits": teacher_bits(pipeline.recipe, stage), "mlp_bits": mlp_bits(pipeline.recipe, stage)}
    spec = TrainSpec.model_validate({"objective": stage, "section": section, "teacher": teacher, **bits})
    inputs = {"data": data[section.data]}
    if student is not None:
        inputs["student"] = student
    return perform(pipeline, stage, spec, inputs)
