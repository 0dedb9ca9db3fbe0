"""Relative places in a recipe, made absolute: jobs run in folders of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.recipe.recipe import Recipe, parse_recipe

_PATH_LISTS = {"paths", "haystack"}
_SINGLE_PLACES = {"path", "tokenizer", "chat_template"}


def anchor_recipe(recipe: Recipe, name_or_path: str, here: Path) -> Recipe:
    """The recipe with its files and folders looked for beside the recipe's own file, then in the folder `here`.

    What is in neither place is left as it is: a hub id, a `demo:` file, or a mistake that `plan` reports.
    """
    given = Path(name_or_path)
    folders = [given.expanduser().absolute().parent, here] if given.suffix in (".yaml", ".yml") else [here]
    return parse_recipe(_anchor(recipe.model_dump(mode="json"), folders, where=name_or_path), where=name_or_path)


def _anchor(value: Any, folders: list[Path], key: str = "", *, where: str) -> Any:
    if isinstance(value, dict):
        # `org/name` is a dataset of the hub, whatever folder has that name here; `./name` is a folder.
        is_hub = value.get("kind") == "hub" and not str(value.get("path")).startswith(".")
        return {
            name: item if is_hub and name != "chat_template" else _anchor(item, folders, name, where=where)
            for name, item in value.items()
        }
    if isinstance(value, list) and key not in _PATH_LISTS:
        return [_anchor(item, folders, where=where) for item in value]
    if isinstance(value, list) or (key in _SINGLE_PLACES and isinstance(value, str)):
        with file_errors(f"{where}: {key}"):
            return [_place(item, folders) for item in value] if isinstance(value, list) else _place(value, folders)
    return value


def _place(text: str, folders: list[Path]) -> str:
    path = Path(text).expanduser()
    if path.is_absolute() or ":" in text:
        return text
    for folder in folders:
        if any(folder.glob(text)) if _is_pattern(text) else (folder / path).exists():
            return str(folder / path)
    return text


def _is_pattern(text: str) -> bool:
    return any(mark in text for mark in "*?[")
