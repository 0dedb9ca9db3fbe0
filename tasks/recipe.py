"""Recipe: what a user asks for, as data.

A recipe is a YAML file validated into frozen pydantic models: unknown keys are refused with a suggestion, sizes are
in tokens, and everything that is wrong is told in one line each before any job starts. It crosses three boundaries
(Prefect's API, the control plane, a job on another machine) unchanged, so it holds no code and no machine paths
beyond those the user wrote.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from radlads.tasks.job import UserError
from radlads.tasks.sections import (
    Align,
    CeSpikes,
    Comprehensive,
    Dataset,
    Distill,
    EvalTask,
    Evaluate,
    FilesSource,
    Finetune,
    HubSource,
    Lora,
    Needle,
    Optimizer,
    Phase,
    Pretrain,
    Publish,
    Rate,
    RecallSource,
    Recipe,
    Resources,
    SampleSource,
    Schedule,
    Section,
    Source,
    Student,
    Teacher,
    Training,
    TransplantScale,
)

__all__ = [
    "Align",
    "CeSpikes",
    "Comprehensive",
    "Dataset",
    "Distill",
    "EvalTask",
    "Evaluate",
    "FilesSource",
    "Finetune",
    "HubSource",
    "Lora",
    "Needle",
    "Optimizer",
    "Phase",
    "Pretrain",
    "Publish",
    "Rate",
    "RecallSource",
    "Recipe",
    "RecipeError",
    "Resources",
    "SampleSource",
    "Schedule",
    "Section",
    "Source",
    "Student",
    "Teacher",
    "Training",
    "TransplantScale",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipe_of_text",
]


class RecipeError(UserError):
    """A recipe that cannot be used; the message says what is wrong, where, and how to mend it."""


def list_recipes() -> list[str]:
    """Names of the recipes shipped in deployments/recipes."""
    folder = resources.files("radlads.deployments") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a YAML file by path, and apply typed overrides.

    overrides: dotted key → value, e.g. {"distill.tokens": 1_000_000, "student.attention_layers": [3]}; None removes an
    optional section. Raises RecipeError, one line per fault.
    """
    return recipe_of_text(_read_text(name_or_path), overrides, where=name_or_path)


def recipe_of_text(text: str, overrides: Mapping[str, Any] | None = None, *, where: str) -> Recipe:
    """A recipe from the YAML of its file, as load_recipe. Raises RecipeError."""
    raw = _unshared(_parse_yaml(text, where))
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    return parse_recipe(raw, where=where)


def parse_recipe(raw: Any, *, where: str = "recipe") -> Recipe:
    """Validate a mapping into a Recipe. Raises RecipeError."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of sections, this is a {type(raw).__name__}")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"{where}: {_explain(fault, raw)}" for fault in _without_echoes(error.errors())]
        raise RecipeError("\n".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; load_recipe of it gives the same recipe."""
    values = recipe.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # PyYAML writes Unicode's own line breaks as they are and reads them as spaces.
    breaks = any(mark in text for mark in "\x85\u2028\u2029")
    return yaml.safe_dump(values, sort_keys=False) if breaks else text


def _read_text(name_or_path: str) -> str:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file at {name_or_path}")
        return path.read_text(encoding="utf-8")
    known = list_recipes()
    if name_or_path not in known:
        raise RecipeError(
            f"no recipe named '{name_or_path}'{_did_you_mean(name_or_path, known)} (`radlads recipes` lists the "
            "shipped ones; a file of your own is given by its path, ending in .yaml)"
        )
    return (resources.files("radlads.deployments") / "recipes" / f"{name_or_path}.yaml").read_text(encoding="utf-8")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _unshared(value: Any) -> Any:
    """A copy in which nothing is there twice: an override of one use of a YAML anchor must not change the others."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _override(raw: Any, dotted: str, value: Any) -> None:
    """Set raw[a][b][c] = value for the key 'a.b.c', making missing mappings on the way."""
    *parents, last = dotted.split(".")
    node = raw
    for part in parents:
        child = node.get(part) if isinstance(node, dict) else None
        if child is None and isinstance(node, dict):
            child = node[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override '{dotted}': '{part}' is not a section that holds other keys")
        node = child
    if not isinstance(node, dict):
        raise RecipeError(f"override '{dotted}': there is no section to put it into")
    node[last] = value


def _without_echoes(faults: list[Any]) -> list[Any]:
    """Without the second fault of a list that counts as empty because what is in it was refused."""
    return [
        fault
        for fault in faults
        if fault["type"] != "too_short"
        or not any(fault is not other and other["loc"][: len(fault["loc"])] == fault["loc"] for other in faults)
    ]


def _keys_written(fault: Any, raw: Any) -> list[str]:
    """The fault's place in the user's own keys: pydantic puts the branch of a union among them."""
    node, keys = raw, []
    for number, part in enumerate(fault["loc"], 1):
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list | tuple) and isinstance(part, int)
        if inside:
            node = node[part]
        elif number < len(fault["loc"]) or fault["type"] != "missing":
            continue
        keys.append(str(part))
    return keys


def _explain(fault: Any, raw: Any) -> str:
    location = _keys_written(fault, raw)
    place = ".".join(location) or "recipe"
    if fault["type"] == "extra_forbidden":
        return f"{place}: unknown key '{location[-1]}'{_did_you_mean(location[-1], _known_keys(fault['loc'][:-1]))}"
    message = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list").replace("Tuple", "List")
    given = fault.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{place}: {message}{shown}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at a location of the recipe, found by walking the models' fields."""
    models: list[type[BaseModel]] = [Recipe]
    for part in location:
        following: list[type[BaseModel]] = []
        for model in models:
            if isinstance(part, str) and part in model.model_fields:
                following += _models_in(model.model_fields[part].annotation)
            elif "kind" in model.model_fields and part in get_args(model.model_fields["kind"].annotation):
                following.append(model)
        models = following or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
