"""The table of stages: complete, asked by whatever lists stages, and the only place that does."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from radlads.deployments.twins import large_recipes, shrink
from radlads.tasks.contracts import specs
from radlads.tasks.contracts.job import JobSpec
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Extend, Finetune, load_recipe, parse_recipe
from radlads.tasks.contracts.recipe.sections import Recipe, Training
from radlads.tasks.contracts.stages import (
    JUDGING_STAGES,
    MODEL_STAGES,
    STAGES,
    STUDENT_STAGES,
    TRAINING_STAGES,
    logits_reference,
    stage_info,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = set(STAGES) - {"plan", "publish"}  # which are words of other things as well
SEARCHED = ("flows", "tasks", "model", "deployments", "benchmarks")
# File → the stages that it may write as a literal, and why. Everything else asks the table.
LITERALS = {
    "tasks/contracts/stages.py": NAMES,  # the table
    "model/training/objectives/__init__.py": set(TRAINING_STAGES),  # objectives by stage
    "flows/cli/evaluate.py": {"evaluate"},  # the command `radlads evaluate`
    "tasks/jobs/choose/choose.py": {"choose"},  # the key of choose.json, the recipe's own
    "tasks/jobs/choose/choice_chart.py": {"choose"},
    "tasks/jobs/report/choice_report.py": {"choose"},
    "tasks/look/results.py": {"needle"},  # the title of a column
    "benchmarks/recipes_gpu.py": {"distill", "evaluate", "needle"},  # sections of the recipes that it cuts
    "benchmarks/drill_case.py": {"distill"},  # the stage that is killed
    "benchmarks/drill_servers.py": {"distill"},
    "benchmarks/training.py": {"align", "distill"},  # what differs between the stages that it times
}


def literals(path: Path) -> set[str]:
    """Names of stages that stand in a file as texts of their own."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)} & NAMES


def test_no_stage_is_named_outside_the_table() -> None:
    for path in sorted(path for folder in SEARCHED for path in (ROOT / folder).rglob("*.py")):
        if {"variants", "training_bench"} & set(path.parts):  # measurements of single stages
            continue
        name = path.relative_to(ROOT).as_posix()
        extra = literals(path) - LITERALS.get(name, set())
        assert not extra, f"{name} names the stages {sorted(extra)}; ask tasks/contracts/stages.py"


def test_the_allowed_literals_are_there() -> None:
    """An entry of the list that is not needed any more would hide the next literal."""
    for name, allowed in LITERALS.items():
        assert literals(ROOT / name) == allowed, name


def test_every_row_has_its_program_its_spec_and_its_section() -> None:
    for name, stage in STAGES.items():
        assert stage.name == name
        assert find_spec(f"radlads.tasks.jobs.{stage.program}") is not None, name
        assert getattr(specs, stage.spec) in get_args(specs.StageSpec)
        assert stage.section is None or stage.section in Recipe.model_fields, name
        assert set(stage.inputs) <= {"student", "data", "models", "products"}
        assert stage.does
        assert not stage.does.endswith(".")


def test_every_spec_is_a_stages() -> None:
    assert {stage.spec for stage in STAGES.values()} == {kind.__name__ for kind in get_args(specs.StageSpec)}


def test_every_section_that_trains_is_a_stages() -> None:
    """A section without a row would be read from the recipe and never run."""
    trains = {
        name
        for name, field in Recipe.model_fields.items()
        if any(isinstance(kind, type) and issubclass(kind, Training) for kind in get_args(field.annotation))
    }
    assert trains == set(TRAINING_STAGES)


def test_training_rows_say_what_the_card_and_the_curves_print() -> None:
    for name in TRAINING_STAGES:
        stage = STAGES[name]
        assert stage.spec == "TrainSpec"
        assert stage.program == "train.train"
        assert stage.makes
        assert stage.section
        assert "data" in stage.inputs
        assert stage.loss != "loss", name
        assert stage.distributed
        assert stage.uses_device
    assert set(STUDENT_STAGES) < set(MODEL_STAGES)
    assert not set(JUDGING_STAGES) & set(MODEL_STAGES)


def test_order_is_the_runs() -> None:
    order = list(STAGES)
    for before, after in zip(
        ["plan", "tokenize", "transplant", "align", "choose", "distill", "finetune", "extend", "evaluate", "needle"],
        ["tokenize", "transplant", "align", "choose", "distill", "finetune", "extend", "evaluate", "needle", "publish"],
        strict=True,
    ):
        assert order.index(before) < order.index(after)


def test_an_unknown_stage_is_refused_in_one_line() -> None:
    with pytest.raises(
        ValueError, match="'polish' is not a stage; the stages are plan, dequantize, tokenize"
    ) as raised:
        stage_info("polish")
    assert "\n" not in str(raised.value)
    fields = {"run": "r", "recipe": "x", "digest": "d", "spec": {}, "output_uri": "o", "store": {"uri": "s"},
              "resources": {"device": "cpu", "processes": 1, "threads": 1}, "scratch": "s"}  # fmt: skip
    assert JobSpec(stage="align", **fields).stage == "align"
    with pytest.raises(ValidationError, match="'polish' is not a stage"):
        JobSpec(stage="polish", **fields)


@pytest.mark.parametrize(
    ("students", "reference"),
    [
        (["transplant", "align", "distill", "finetune"], "distill"),
        (["transplant", "align", "choose", "distill", "finetune"], "distill"),
        (["transplant", "align", "distill", "finetune", "extend"], "distill"),
        (["transplant", "align", "distill"], None),
        (["transplant", "align", "finetune"], None),
        (["transplant"], None),
        ([], None),
    ],
)
def test_what_is_judged_beside_the_newest_model(students, reference) -> None:
    assert logits_reference(students) == reference


def test_a_section_is_read_as_its_stages_and_nothing_else() -> None:
    sizes = {"tokens": 64, "context": 8, "batch": 2}
    for stage, kind in (("align", Align), ("distill", Distill), ("finetune", Finetune), ("extend", Extend)):
        spec = specs.TrainSpec(objective=stage, section=sizes, teacher=None)
        assert type(spec.section) is kind
        again = specs.parse_spec(stage, spec.model_dump(mode="json"))
        assert again == spec
        assert type(again.section) is kind
        assert "mixer_rate" in spec.model_dump(mode="json")["section"]
    with pytest.raises(ValidationError, match="the section of distill must be of the class Distill"):
        specs.TrainSpec(objective="distill", section=Finetune(**sizes), teacher=None)
    with pytest.raises(ValidationError, match="loss: Extra inputs are not permitted"):
        specs.TrainSpec(objective="finetune", section=sizes | {"loss": "l2"}, teacher=None)
    with pytest.raises(ValidationError, match="'plan' is not a training stage; those are pretrain, align"):
        specs.TrainSpec(objective="plan", section=sizes, teacher=None)


def test_the_recipe_lists_its_stages_as_the_table_does() -> None:
    smoke = load_recipe("smoke")
    assert smoke.training_stages == ("align", "distill", "finetune")
    assert load_recipe("smoke", {"distill": None}).training_stages == ("align", "finetune")
    assert load_recipe("demo-teacher").training_stages == ()
    assert smoke.datasets_used == tuple(name for name in smoke.data if name in smoke.datasets_used)


@pytest.mark.parametrize("stage", [name for name in STAGES if STAGES[name].section and "data" in STAGES[name].inputs])
def test_a_dataset_that_is_not_there_is_found_in_every_section(stage) -> None:
    raw = load_recipe("demo-teacher" if stage == "pretrain" else "smoke").model_dump(mode="json")
    raw[stage] = (raw[stage] or {"tokens": 64, "context": 8, "batch": 2}) | {"data": "elsewhere"}
    with pytest.raises(Exception, match=f"{stage}.data is 'elsewhere'"):
        parse_recipe(raw)


def test_twins_have_the_stages_of_their_originals() -> None:
    for name, raw in large_recipes():
        twin = shrink(raw)
        assert [s for s in TRAINING_STAGES if s in twin] == [s for s in TRAINING_STAGES if s in raw], name
