"""The plan's pins: the current content of every place that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from radlads.tasks.contracts.identity import Reading, readings
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.hub import hub_commit
from radlads.tasks.contracts.pins.pins import pin_place
from radlads.tasks.contracts.recipe.sections import EvalTask, Recipe
from radlads.tasks.contracts.specs import Pin, TeacherRef
from radlads.tasks.jobs.plan.checks import Findings


def pin_hub(recipe: Recipe, findings: Findings) -> dict[str, Pin]:
    """Location in the recipe → commit, for the datasets of the hub that it and its evaluation tasks read.

    It is fast and runs first, so that all other checks read the pinned commits.
    """
    pins: dict[str, Pin] = {}
    for reading in _read(recipe):
        if reading.kind == "dataset" and not Path(reading.place[0]).expanduser().is_dir():
            with findings.at(_section(reading.location)):
                pins[reading.location] = pin_place(reading, ContentHashes())
    for index, task in enumerate(recipe.evaluate.tasks if recipe.evaluate is not None else ()):
        if task.path is None or Path(task.path).expanduser().is_dir():  # if not, the check of the tasks reports it
            with findings.at("evaluate.tasks"):
                place = () if task.path is None else (task.path,)
                pins[f"evaluate.tasks.{index}.path"] = Pin(kind="task", place=place, content="", commits=_commits(task))
    return pins


def pin_contents(
    recipe: Recipe, teacher: TeacherRef | None, hub: Mapping[str, Pin], findings: Findings, hashes: ContentHashes
) -> dict[str, Pin]:
    """Location in the recipe → its content's pin, for everything that a stage reads; every byte is read once.

    hub: the result of pin_hub.
    """
    pins: dict[str, Pin] = {}
    for reading in _read(recipe):
        known = hub.get(reading.location)
        if reading.kind == "teacher":
            if teacher is not None:
                content, revision = teacher.fingerprint, reading.revision
                pins[reading.location] = Pin(kind="teacher", place=reading.place, revision=revision, content=content)
        elif known is not None and known.content:
            pins[reading.location] = known
        else:
            with findings.at(_section(reading.location)):
                commits = known.commits if known is not None else {}
                pins[reading.location] = pin_place(reading, hashes).model_copy(update={"commits": commits})
    return pins


def _read(recipe: Recipe) -> Iterator[Reading]:
    """Places that some stage reads; unused datasets are excluded."""
    used = tuple(f"data.{name}." for name in recipe.datasets_used)
    for reading in readings(recipe):
        if not reading.location.startswith("data.") or reading.location.startswith(used):
            yield reading


def pinned_tokenizer(teacher: TeacherRef | None, pins: Mapping[str, Pin]) -> str:
    """The fingerprint of the tokenizer that all texts are read with; "" where only sizes are planned."""
    if teacher is not None:
        return teacher.tokenizer_fingerprint
    pin = pins.get("pretrain.tokenizer")
    return "" if pin is None else pin.content


def _commits(task: EvalTask) -> dict[str, str]:
    """Hub dataset → commit, for all datasets that a task of the harness reads."""
    from radlads.tasks.jobs.judge.lmeval import hub_datasets  # the harness takes seconds to import

    key = "`dataset_kwargs: {revision: <commit>}` in a YAML file of your own, given as the task's `path`"
    found = sorted(hub_datasets(task).items())
    return {name: hub_commit(name, revision, "dataset", key=key) for name, revision in found}


def _section(location: str) -> str:
    """The place under which the plan's other checks report faults of a location."""
    return "student" if location.startswith("student.") else location.rpartition(".")[0]
