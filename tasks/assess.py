"""evaluate and needle: the student beside its teacher."""

from __future__ import annotations

from collections.abc import Mapping

from radlads.tasks.job import UserError
from radlads.tasks.observe import show_picture
from radlads.tasks.perform import perform, stage_task
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.specs import EvaluateSpec, NeedleSpec
from radlads.tasks.stage import Product
from radlads.tasks.stage_specs import planned_teacher
from radlads.tasks.tracking import log_file


@stage_task("evaluate")
def evaluate(pipeline: Pipeline, plan: Plan, data: Mapping[str, Product], students: Mapping[str, Product]) -> Product:
    """Held-out loss, KL and tasks. students: stage → its model, in order; the last one is the student, the others show
    what each stage brought."""
    section = pipeline.recipe.evaluate
    if section is None:
        raise UserError(f"the recipe '{pipeline.recipe.name}' has no section `evaluate`")
    *earlier, last = students
    inputs = {"student": students[last], "data": data[section.data], **{stage: students[stage] for stage in earlier}}
    return perform(pipeline, "evaluate", EvaluateSpec(section=section, teacher=planned_teacher(plan.report)), inputs)


@stage_task("needle")
def needle(pipeline: Pipeline, plan: Plan, students: Mapping[str, Product]) -> Product:
    """Retrieval over depth and length, by generation. The last of `students` is judged; beside a finetuned one, what it
    was before, since finetuning can lose recall that every other number keeps."""
    section = pipeline.recipe.needle
    if section is None:
        raise UserError(f"the recipe '{pipeline.recipe.name}' has no section `needle`")
    spec = NeedleSpec(
        section=section,
        teacher=planned_teacher(plan.report),
        training_length=section.training_length or longest_context(pipeline),
    )
    inputs = {"student": list(students.values())[-1]}
    if "finetune" in students and "distill" in students:
        inputs["distill"] = students["distill"]
    product = perform(pipeline, "needle", spec, inputs)
    picture = pipeline.store.read_file(pipeline.store.key(product.uri), "needle.png")
    show_picture(pipeline.run, "needle-heatmap", picture, f"Needle in a haystack, teacher and student: {pipeline.run}")
    log_file(pipeline.parent, "needle.png", picture)
    return product


def longest_context(pipeline: Pipeline) -> int:
    """The longest context, in tokens, that a training stage of the recipe sees; the needle's own where none trains."""
    recipe = pipeline.recipe
    contexts = [one.longest_context for one in (recipe.align, recipe.distill, recipe.finetune) if one is not None]
    return max(contexts, default=max(recipe.needle.lengths) if recipe.needle is not None else 1)
