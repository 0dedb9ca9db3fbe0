"""Which stage reads which product: for a conversion, for the evaluation of a finished run, and for a new teacher.

The dependencies are defined here only. A runner executes the stages: as Prefect tasks (stage_tasks.py), or in this
process (plain_runner.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import SCHEMA_VERSION
from radlads.tasks.contracts.recipe.choice import choice_data, late_choice
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.specs import PlanReport, PublishSpec, StageSpec, foreign_teacher
from radlads.tasks.contracts.stages import (
    ALIGN,
    CHOOSE,
    DEQUANTIZE,
    EVALUATE,
    NEEDLE,
    PLAN,
    PRETRAIN,
    PUBLISH,
    TOKENIZE,
    TRANSPLANT,
    logits_reference,
)
from radlads.tasks.contracts.store.errors import older_schema
from radlads.tasks.pipeline import Plan
from radlads.tasks.stage import Product
from radlads.tasks.stage_specs import (
    choose_spec,
    dequantize_spec,
    evaluate_spec,
    needle_spec,
    planned_teacher,
    tokenize_spec,
    train_spec,
    transplant_spec,
)


class Pending(Protocol):
    """A stage that was started."""

    def result(self) -> Product:
        """Wait for its end and return its product. Raises what the stage raised."""


class Runner(Protocol):
    """Runs the stages of a graph. Each method raises what run_stage raises."""

    def plan(self, recipe: Recipe) -> Plan:
        """Run the stage `plan` and read its report, which pins the inputs of later stages."""

    def run(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None) -> Product:
        """The product of a stage, new or reused. label: its display name, for a stage that a run has several times."""

    def submit(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product]) -> Pending:
        """Start a stage that runs in parallel with its siblings."""


def convert(recipe: Recipe, runner: Runner) -> dict[str, Product]:
    """From a teacher to an evaluated, exported student: stage (or `<dataset> data`) → product, in order. Stages that
    are not in the recipe are skipped. Raises UserError for a recipe that makes a teacher.
    """
    plan = runner.plan(recipe)
    planned_teacher(plan.report)
    teacher = _dequantize(plan.report, runner)
    data = {name: _tokenize(recipe, plan.report, runner, name, teacher) for name in recipe.datasets_used}
    students = {TRANSPLANT.name: runner.run(TRANSPLANT.name, transplant_spec(recipe, plan.report), teacher)}
    for stage in recipe.training_stages:
        students[stage] = _train(recipe, plan.report, runner, stage, data, newest(students), teacher)
        if stage == ALIGN.name and late_choice(recipe) is not None:
            students[CHOOSE.name] = _choose(recipe, plan.report, runner, data, students[stage], teacher)
    judged = _judge(recipe, plan.report, runner, data, students, teacher)
    folder = {DEQUANTIZE.name: teacher["teacher"]} if teacher else {}
    return _publish(recipe, runner, plan, data, folder | students | judged)


def judge(
    recipe: Recipe, runner: Runner, students: Mapping[str, Product], *, other_teacher: bool = False
) -> dict[str, Product]:
    """Evaluate existing models by the recipe's sections `evaluate` and `needle`: stage → product.

    students: stage → its model, in order. other_teacher: allow models made from a teacher other than the recipe's;
    without it, UserError is raised for them.
    """
    plan = runner.plan(recipe)
    check_students(plan.report, students, other_teacher=other_teacher)
    names = [recipe.evaluate.data] if recipe.evaluate is not None else []
    teacher = _dequantize(plan.report, runner)
    data = {name: _tokenize(recipe, plan.report, runner, name, teacher) for name in names}
    return _judge(recipe, plan.report, runner, data, students, teacher, other_teacher=other_teacher)


def pretrain(recipe: Recipe, runner: Runner) -> dict[str, Product]:
    """Train a small teacher from random weights: stage (or `<dataset> data`) → product. Raises UserError for a recipe
    that converts one."""
    if recipe.pretrain is None:
        raise UserError(f"the recipe '{recipe.name}' has no section `pretrain`; run it with the flow radlads")
    plan = runner.plan(recipe)
    name = recipe.pretrain.data
    data = {name: _tokenize(recipe, plan.report, runner, name, {})}
    teacher = _train(recipe, plan.report, runner, PRETRAIN.name, data, None, {})
    return _publish(recipe, runner, plan, data, {PRETRAIN.name: teacher})


def newest(students: Mapping[str, Product]) -> Product:
    """The last of the models: the next stage starts from it, and it is evaluated and exported."""
    return students[list(students)[-1]]


def check_students(report: PlanReport, students: Mapping[str, Product], *, other_teacher: bool) -> None:
    """Raises UserError if models of another run were made from a teacher other than the plan's, unless that is allowed.
    The jobs check again, in the models themselves."""
    teacher = planned_teacher(report)
    for stage, product in students.items():
        made_from = product.manifest.spec.get("teacher")
        if other_teacher or made_from is None:
            continue
        if product.manifest.schema_version != SCHEMA_VERSION:
            raise UserError(f"{older_schema(product.uri, product.manifest)}; or evaluate it with --other-teacher")
        if made_from["fingerprint"] != teacher.fingerprint:
            raise UserError(foreign_teacher(stage, made_from["fingerprint"], teacher.fingerprint))


def _dequantize(report: PlanReport, runner: Runner) -> dict[str, Product]:
    """The input `teacher` of all stages that read one: of a GGUF file its folder, of any other teacher nothing."""
    spec = dequantize_spec(report)
    return {} if spec is None else {"teacher": runner.run(DEQUANTIZE.name, spec, {})}


def _tokenize(recipe: Recipe, report: PlanReport, runner: Runner, name: str, teacher: Mapping[str, Product]) -> Product:
    return runner.run(TOKENIZE.name, tokenize_spec(recipe, report, name), teacher, label=f"{TOKENIZE.name} {name}")


def _train(
    recipe: Recipe,
    report: PlanReport,
    runner: Runner,
    stage: str,
    data: Mapping[str, Product],
    student: Product | None,
    teacher: Mapping[str, Product],
) -> Product:
    spec = train_spec(recipe, report, stage)
    inputs = {name: data[dataset] for name, dataset in spec.section.datasets.items()}
    inputs |= {} if spec.teacher is None else teacher
    return runner.run(stage, spec, inputs if student is None else inputs | {"student": student})


def _choose(
    recipe: Recipe,
    report: PlanReport,
    runner: Runner,
    data: Mapping[str, Product],
    aligned: Product,
    teacher: Mapping[str, Product],
) -> Product:
    spec = choose_spec(recipe, report)
    if spec is None:
        raise UserError(f"the plan of the recipe '{recipe.name}' leaves no attention layers to be chosen after align")
    name = choice_data(recipe)
    return runner.run(
        CHOOSE.name, spec, {"student": aligned, **teacher} | ({} if name is None else {"data": data[name]})
    )


def _judge(
    recipe: Recipe,
    report: PlanReport,
    runner: Runner,
    data: Mapping[str, Product],
    students: Mapping[str, Product],
    teacher: Mapping[str, Product],
    *,
    other_teacher: bool = False,
) -> dict[str, Product]:
    """The stages evaluate and needle, in parallel. evaluate reads every model, to show the effect of each stage. needle
    reads the newest model and, if the last training had no teacher, the model before that: such training can lose
    recall."""
    started: dict[str, Pending] = {}
    student = {"student": newest(students), **teacher}
    if recipe.evaluate is not None:
        spec = evaluate_spec(recipe, report, other_teacher=other_teacher)
        earlier = {stage: students[stage] for stage in list(students)[:-1]}
        inputs = student | {"data": data[recipe.evaluate.data]} | earlier
        started[EVALUATE.name] = runner.submit(EVALUATE.name, spec, inputs)
    if recipe.needle is not None:
        reference = logits_reference(students)
        inputs = student | ({} if reference is None else {reference: students[reference]})
        retrieval = needle_spec(recipe, report, other_teacher=other_teacher)
        started[NEEDLE.name] = runner.submit(NEEDLE.name, retrieval, inputs)
    return {stage: pending.result() for stage, pending in started.items()}


def _publish(
    recipe: Recipe, runner: Runner, plan: Plan, data: Mapping[str, Product], made: Mapping[str, Product]
) -> dict[str, Product]:
    """All products, including the report and the exported folder that are made from them."""
    datasets = {f"{name} data": product for name, product in data.items()}
    products = {PLAN.name: plan.product, **datasets, **made}
    spec = PublishSpec(section=recipe.publish, recipe=recipe)
    return products | {PUBLISH.name: runner.run(PUBLISH.name, spec, products)}
