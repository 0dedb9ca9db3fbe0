"""Reads, validates and writes recipes.

A recipe is a YAML file, validated into frozen pydantic models. Unknown keys are rejected with a suggestion, sizes are
in tokens, and every error is one line, reported before any job starts. A recipe is passed unchanged to Prefect's API,
the control plane and jobs on other machines, so it contains no code, and only the paths that the user wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from radlads.tasks.contracts.errors import did_you_mean
from radlads.tasks.contracts.parsing.credentials import find_secret, hide
from radlads.tasks.contracts.parsing.document import MOST_BYTES, DocumentError, one_line, plain_values, shown
from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.parsing.yaml_reader import dump_yaml, read_yaml
from radlads.tasks.contracts.recipe import sections
from radlads.tasks.contracts.recipe.sections import *  # noqa: F403 (what a recipe consists of, by the list over there)
from radlads.tasks.contracts.recipe.sections import Recipe

__all__ = ["RecipeError", "dump_recipe", "list_recipes", "load_recipe", "parse_recipe", "recipe_of_data"]
__all__ += sections.__all__

_MOST_FAULTS = 20


class RecipeError(DocumentError):
    """An invalid recipe; the message has the fault, its location and the remedy."""


def list_recipes() -> list[str]:
    """Names of the recipes shipped in deployments/recipes."""
    folder = resources.files("radlads.deployments") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path, and apply typed overrides.

    overrides: dotted key → value, e.g. {"distill.tokens": 1_000_000, "student.attention_layers": [3]}; None removes an
    optional section. Raises DocumentError, one line per fault.
    """
    where = one_line(hide(name_or_path), 200)
    return recipe_of_data(_read_data(name_or_path, where), overrides, where=where)


def recipe_of_data(data: bytes, overrides: Mapping[str, Any] | None = None, *, where: str) -> Recipe:
    """A recipe from the bytes of its YAML file, as load_recipe. Raises DocumentError."""
    raw = read_yaml(data, where=where)
    if overrides is not None and not isinstance(overrides, Mapping):
        raise RecipeError(f"overrides: expected a mapping of dotted keys to values, not {shown(overrides)}")
    for key, value in plain_values(overrides or {}, where="overrides").items():
        _override(raw, key, value)
    return parse_recipe(raw, where=where)


def parse_recipe(raw: Any, *, where: str = "recipe") -> Recipe:
    """Validate a mapping into a Recipe. Raises DocumentError."""
    where = one_line(hide(where))
    if not isinstance(raw, dict):
        kinds = {type(None): "empty", list: "a list", str: "text"}
        raise RecipeError(
            f"{where}: a recipe must be a mapping of sections, but this is {kinds.get(type(raw), shown(raw))}"
        )
    raw = plain_values(raw, where=where)
    secret = find_secret(raw)
    if secret is not None:
        raise RecipeError(
            f"{where}: {one_line('.'.join(secret.keys), 120)}: this contains {secret.what}, and recipes are stored "
            f"in several places; {secret.cure}"
        )
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = _without_echoes(error.errors(include_context=False, include_url=False))
        lines = [f"{where}: {_explain(fault, raw)}" for fault in faults[:_MOST_FAULTS]]
        if len(faults) > _MOST_FAULTS:
            lines.append(f"{where}: and {len(faults) - _MOST_FAULTS} more faults")
        raise RecipeError("\n".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read_data(name_or_path: str, where: str) -> bytes:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        with file_errors(where):
            if path.is_dir():
                raise RecipeError(f"{where} is a folder, not a recipe file")
            if not path.is_file():
                raise RecipeError(f"no recipe file at {where}")
            with path.open("rb") as stream:
                return stream.read(MOST_BYTES + 1)
    known = list_recipes()
    if name_or_path not in known:
        raise RecipeError(
            f"no recipe named '{where}'{did_you_mean(name_or_path, known)} (`radlads recipes` lists the "
            "shipped ones; a file of your own is given by its path, ending in .yaml)"
        )
    return (resources.files("radlads.deployments") / "recipes" / f"{name_or_path}.yaml").read_bytes()


def _override(raw: Any, dotted: str, value: Any) -> None:
    """Set raw[a][b][c] = value for the key 'a.b.c'; creates missing mappings."""
    *parents, last = dotted.split(".")
    if not all((*parents, last)):
        raise RecipeError(f"override '{one_line(dotted, 120)}': separate keys by single dots, as in align.tokens")
    dotted = one_line(dotted, 120)
    node = raw
    for part in parents:
        child = node.get(part) if isinstance(node, dict) else None
        if child is None and isinstance(node, dict):
            child = node[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override '{dotted}': '{one_line(part, 60)}' is not a section with keys")
        node = child
    if not isinstance(node, dict):
        raise RecipeError(f"override '{dotted}': there is no section for it")
    node[last] = value


def _without_echoes(faults: list[Any]) -> list[Any]:
    """Remove `too_short` faults of lists whose items have faults of their own."""
    return [
        fault
        for fault in faults
        if fault["type"] != "too_short"
        or not any(fault is not other and other["loc"][: len(fault["loc"])] == fault["loc"] for other in faults)
    ]


def _keys_written(fault: Any, raw: Any) -> list[str]:
    """The location of a fault in the user's keys, without the union branches that pydantic adds."""
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
    place = one_line(".".join(location), 200) or "recipe"
    if fault["type"] == "extra_forbidden":
        word = location[-1]
        return f"{place}: unknown key '{one_line(word, 60)}'{did_you_mean(word, _known_keys(fault['loc'][:-1]))}"
    message = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list").replace("Tuple", "List")
    given = fault.get("input")
    suffix = f" (given: {shown(given)})" if isinstance(given, str | int | float | bool) else ""
    return f"{place}: {one_line(message)}{suffix}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed at a location of the recipe."""
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
