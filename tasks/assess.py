"""evaluate and needle: the student beside its teacher."""

from __future__ import annotations

from collections.abc import Mapping

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import SCHEMA_VERSION
from radlads.tasks.contracts.specs import foreign_teacher
from radlads.tasks.contracts.store.errors import older_schema
from radlads.tasks.contracts.tracking import log_file
from radlads.tasks.observe import show_picture
from radlads.tasks.perform import perform, stage_task
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.stage import Product
from radlads.tasks.stage_specs import evaluate_spec, needle_spec, planned_teacher


@stage_task("evaluate")
def evaluate(
    pipeline: Pipeline,
    plan: Plan,
    data: Mapping[str, Product],
    students: Mapping[str, Product],
    other_teacher: bool = False,
) -> Product:
    """Held-out loss, KL and tasks. students: stage → its model, in order; the last one is the student, the others show
    what each stage brought. other_teacher: they may have been made from another one than the plan's."""
    spec = evaluate_spec(pipeline.recipe, plan.report, other_teacher=other_teacher)
    *earlier, last = students
    inputs = {
        "student": students[last],
        "data": data[spec.section.data],
        **{stage: students[stage] for stage in earlier},
    }
    return perform(pipeline, "evaluate", spec, inputs)


@stage_task("needle")
def needle(pipeline: Pipeline, plan: Plan, students: Mapping[str, Product], other_teacher: bool = False) -> Product:
    """Retrieval over depth and length, by generation. The last of `students` is judged; beside a finetuned one, what it
    was before, since finetuning can lose recall that every other number keeps. other_teacher: as of evaluate."""
    spec = needle_spec(pipeline.recipe, plan.report, other_teacher=other_teacher)
    inputs = {"student": list(students.values())[-1]}
    if "finetune" in students and "distill" in students:
        inputs["distill"] = students["distill"]
    product = perform(pipeline, "needle", spec, inputs)
    picture = pipeline.store.read_file(pipeline.store.key(product.uri), "needle.png")
    whose = " (not the student's own teacher)" if other_teacher else ""
    show_picture(
        pipeline.run, "needle-heatmap", picture, f"Needle in a haystack, teacher{whose} and student: {pipeline.run}"
    )
    log_file(pipeline.parent, "needle.png", picture)
    return product


def check_students(plan: Plan, students: Mapping[str, Product], *, other_teacher: bool) -> None:
    """Raises UserError where models of another run were made from another teacher than the plan's, unless that is
    meant. The jobs look again, into the models themselves."""
    teacher = planned_teacher(plan.report)
    for stage, product in students.items():
        made_from = product.manifest.spec.get("teacher")
        if other_teacher or made_from is None:
            continue
        if product.manifest.schema_version != SCHEMA_VERSION:
            raise UserError(f"{older_schema(product.uri, product.manifest)}; or judge it with --other-teacher")
        if made_from["fingerprint"] != teacher.fingerprint:
            raise UserError(foreign_teacher(stage, made_from["fingerprint"], teacher.fingerprint))
