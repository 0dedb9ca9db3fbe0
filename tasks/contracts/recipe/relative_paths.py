"""Makes relative paths in a recipe absolute, because jobs run in other folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.recipe.recipe import Recipe, parse_recipe

_PATH_LISTS = {"paths", "haystack", "prompts"}
_SINGLE_PLACES = {"path", "tokenizer", "chat_template", "hosts", "ssh_config", "squad", "hotpotqa"}


def anchor_recipe(recipe: Recipe, name_or_path: str, here: Path) -> Recipe:
    """Resolve relative paths against the folder of the recipe file, then against the folder `here`.

    Paths that exist in neither are unchanged: hub ids, `demo:` files, or errors that `plan` reports.
    """
    path = Path(name_or_path)
    folders = [path.expanduser().absolute().parent, here] if path.suffix in (".yaml", ".yml") else [here]
    return parse_recipe(_anchor(recipe.model_dump(mode="json"), folders, where=name_or_path), where=name_or_path)


def _anchor(value: Any, folders: list[Path], key: str = "", *, where: str) -> Any:
    if isinstance(value, dict):
        # `org/name` is always a hub dataset; `./name` is a folder.
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
