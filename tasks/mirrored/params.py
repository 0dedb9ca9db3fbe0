"""The parameters of runs in MLflow: every key of the resolved recipe, its defaults too, under the recipe's own dotted
names, the same in a run and in its stages, so that Compare shows what differs wherever it is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from radlads.tasks.contracts.recipe.choice import AttentionChoice
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.contracts.stages import TOKENIZE, stage_info

_ABOUT = ("name", "description", "sources")
"""Keys of a recipe that say what it is, not what it does."""
_LONG = ("pins", "recipe")
"""Parts of a spec that are shown otherwise: the contents of files in the manifest, the recipe in the run above."""


def run_params(recipe: Recipe) -> dict[str, Any]:
    """The parameters of a pipeline's run: `variant`, `teacher`, `layers`, and every key of the recipe."""
    values = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in _ABOUT}
    if recipe.teacher is None:
        values.pop("student")
    return main_params(recipe) | dict(flat_params(values))


def main_params(recipe: Recipe) -> dict[str, Any]:
    """What names a conversion; on every run of it."""
    if recipe.teacher is None:
        return {"recipe": recipe.name}
    kept = recipe.student.attention_layers
    layers = f"{kept.count} by {kept.choose}" if isinstance(kept, AttentionChoice) else _layers(kept)
    return {
        "recipe": recipe.name,
        "teacher": recipe.teacher.path,
        "variant": recipe.student.variant,
        "layers": layers,
    }


def stage_params(recipe: Recipe | None, stage: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a stage's run: its section under the recipe's names, and what names the conversion. recipe:
    None where this version cannot read it."""
    section = f"data.{spec['name']}" if stage == TOKENIZE.name else stage_info(stage).section or stage
    renamed = {"section": section, "dataset": section}
    values = {renamed.get(key, key): value for key, value in spec.items() if key not in _LONG}
    names = {} if recipe is None else main_params(recipe)
    return dict(flat_params(values)) | names


def planned_params(report: PlanReport) -> dict[str, Any]:
    """What only the plan knows of a run."""
    known: dict[str, Any] = {"planned.teacher_parameters": report.teacher_parameters}
    if report.teacher is not None:
        known |= {
            "planned.student_parameters": report.student_parameters,
            "planned.mixer_parameters": report.mixer_parameters,
            "planned.num_layers": report.num_layers,
        }
    if report.choice is None and report.teacher is not None:
        known["planned.attention_layers"] = _layers(report.attention_layers)
    if report.gpu_hours is not None:
        known["planned.gpu_hours"] = round(report.gpu_hours, 2)
    if report.dollars is not None:
        known["planned.dollars"] = round(report.dollars, 2)
    return known


def _layers(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"


def flat_params(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1, "c": [{"d": 2}]}} → a.b, a.c.0.d; what is not set is left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat_params(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        for index, one in enumerate(value):
            yield from flat_params(one, f"{name}.{index}")
    elif value is not None:
        yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
