"""align, distill, finetune, and pretrain: the same job with four objectives; and the choice of layers between two."""

from __future__ import annotations

from collections.abc import Mapping

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import choice_data
from radlads.tasks.observe import show_picture
from radlads.tasks.perform import perform, stage_task
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.stage import Product
from radlads.tasks.stage_specs import TrainingStage, choose_spec, train_spec


@stage_task("align")
def align(pipeline: Pipeline, plan: Plan, data: Mapping[str, Product], student: Product) -> Product:
    """Stage 1: every mixer learns what the attention that it replaces puts out."""
    return _train(pipeline, "align", plan, data, student)


@stage_task("choose")
def choose(pipeline: Pipeline, plan: Plan, data: Mapping[str, Product], student: Product) -> Product:
    """Find the layers that are to be softmax attention again, and give them back. student: the aligned one."""
    spec = choose_spec(pipeline.recipe, plan.report)
    if spec is None:
        raise UserError(f"the recipe '{pipeline.recipe.name}' leaves no attention layers to be chosen after align")
    name = choice_data(pipeline.recipe)
    inputs = {"student": student} if name is None else {"student": student, "data": data[name]}
    product = perform(pipeline, "choose", spec, inputs)
    picture = pipeline.store.read_file(pipeline.store.key(product.uri), "choose.png")
    show_picture(pipeline.run, "attention-layers", picture, f"Layers scored and chosen: {pipeline.run}")
    return product


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
    stage: TrainingStage,
    plan: Plan,
    data: Mapping[str, Product],
    student: Product | None,
) -> Product:
    spec = train_spec(pipeline.recipe, plan.report, stage)
    inputs = {"data": data[spec.section.data]}
    if student is not None:
        inputs["student"] = student
    return perform(pipeline, stage, spec, inputs)
