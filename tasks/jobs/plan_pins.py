"""The plan's pins: every place that a recipe names, by what is there now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from radlads.tasks.content import ContentHashes
from radlads.tasks.hub import hub_commit
from radlads.tasks.identity import readings
from radlads.tasks.jobs.checks import Findings
from radlads.tasks.pins import pin_place
from radlads.tasks.sections import EvalTask, Recipe
from radlads.tasks.specs import Pin, TeacherRef


def pin_recipe(recipe: Recipe, teacher: TeacherRef | None, findings: Findings, hashes: ContentHashes) -> dict[str, Pin]:
    """Location in the recipe → what is there, for everything that a stage reads."""
    used = tuple(f"data.{name}." for name in recipe.datasets_used)
    pins: dict[str, Pin] = {}
    for reading in readings(recipe):
        location = reading.location
        if location.startswith("data.") and not location.startswith(used):
            continue
        if reading.kind == "teacher":
            if teacher is not None:
                content = teacher.fingerprint
                pins[location] = Pin(kind="teacher", place=reading.place, revision=reading.revision, content=content)
            continue
        if reading.kind == "task" and reading.place and not Path(reading.place[0]).expanduser().is_dir():
            continue  # the check of the tasks says so
        with findings.at(_section(location)):
            pins[location] = pin_place(reading, hashes)
    if recipe.evaluate is not None:
        for index, task in enumerate(recipe.evaluate.tasks):
            location = f"evaluate.tasks.{index}.path"
            if location in pins:
                with findings.at("evaluate.tasks"):
                    pins[location] = pins[location].model_copy(update={"commits": _commits(task)})
    return pins


def pinned_tokenizer(teacher: TeacherRef | None, pins: Mapping[str, Pin]) -> str:
    """The fingerprint of the tokenizer that all texts are read with; "" where only sizes are planned."""
    if teacher is not None:
        return teacher.tokenizer_fingerprint
    pin = pins.get("pretrain.tokenizer")
    return "" if pin is None else pin.content


def _commits(task: EvalTask) -> dict[str, str]:
    """Hub dataset → commit, of all that a task of the harness reads."""
    from radlads.tasks.jobs.lmeval import hub_datasets  # the harness takes seconds to import

    return {name: hub_commit(name, revision, "dataset") for name, revision in sorted(hub_datasets(task).items())}


def _section(location: str) -> str:
    """Where the plan's other checks report faults of a location."""
    return "student" if location.startswith("student.") else location.rpartition(".")[0]
