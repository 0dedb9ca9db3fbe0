"""The grid of a sweep: which members it has, what each is called, and what cannot be swept over."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import BaseModel

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import canonical_json
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.document import one_line, shown
from radlads.tasks.contracts.parsing.yaml_reader import parse_value
from radlads.tasks.contracts.recipe.base import PLACE, Reads, Undigested
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe
from radlads.tasks.contracts.settings import check_run_name

MOST_MEMBERS = 64
"""Of a sweep that is not confirmed."""
_ABOUT = ("name", "description", "sources")
_LONGEST_NAME = 128
_LONGEST_TEXT = 24
_HASH_DIGITS = 8

Grid = Mapping[str, Sequence[Any]]
"""Dotted key → values."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep. values: dotted key → value, as the recipe resolves it. overrides: what the run is started
    with, the sweep's own included."""

    name: str
    values: dict[str, Any]
    overrides: dict[str, Any]
    recipe: Recipe


def parse_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """["distill.tokens=1e6,2e6"] → {"distill.tokens": [1000000, 2000000]}; values are YAML scalars or lists of them.

    Raises UserError, one line.
    """
    grid: dict[str, list[Any]] = {}
    for option in options:
        key, equals, text = option.partition("=")
        named = f"--grid {one_line(hide(key), 60)}"
        if not equals or not key:
            raise UserError(
                f"--grid {one_line(hide(option), 60)}: write it as KEY=VALUE,VALUE, e.g. --grid distill.tokens=1e6,2e6"
            )
        if key in grid:
            raise UserError(f"{named} is given twice; list all of its values in one of them")
        if not text.strip() or text.rstrip().endswith(","):
            raise UserError(f"{named}: a value is missing; write it as KEY=VALUE,VALUE")
        values = parse_value(f"[{text}\n]", where=f"--grid {one_line(hide(option), 60)}")
        for value in values:
            if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
                raise UserError(f"{named}: {shown(value)} is neither a single value nor a list of single values")
        grid[key] = values
    if not grid:
        raise UserError("a sweep needs at least one --grid KEY=VALUE,VALUE, e.g. --grid distill.tokens=1e6,2e6")
    return grid


def make_members(
    recipe: str, grid: Grid, overrides: Mapping[str, Any], sweep: str, *, most: int | None = MOST_MEMBERS
) -> list[Member]:
    """The runs of a sweep, every combination of the grid's values, the last key's values varying fastest.

    recipe, overrides: as of load_recipe, for all members. sweep: its name, which starts the names of its runs. most:
    members that are allowed. Raises UserError for what no recipe has, what repeats, and keys that cannot be swept.
    """
    _check_overlap(grid, overrides)
    count = 1
    for values in grid.values():
        count *= len(values)
    if most is not None and count > most:
        raise UserError(f"the grid has {count:,} members; a sweep of more than {most} has to be confirmed with --yes")
    tails = short_keys(grid)
    members: list[Member] = []
    for values in product(*grid.values()):
        asked = {**overrides, **dict(zip(grid, values, strict=True))}
        resolved = load_recipe(recipe, asked)
        if not members:
            for key in grid:
                _check_sweepable(resolved, key)
        found = {key: _resolved(resolved, key, value) for key, value in zip(grid, values, strict=True)}
        members.append(Member(member_name(sweep, found, tails), found, asked, resolved))
    _check_distinct(grid, members)
    return members


def short_keys(grid: Grid) -> dict[str, str]:
    """Key → what it is called in names and tables: without the section where that is still one key's alone."""
    tails = {key: key.partition(".")[2] or key for key in grid}
    counts = list(tails.values())
    return {key: tail if counts.count(tail) == 1 else key for key, tail in tails.items()}


def member_name(sweep: str, values: Mapping[str, Any], tails: Mapping[str, str]) -> str:
    """The name of a member's run: the same for the same values, whatever other members there are.

    Where the values cannot be written exactly in a run's name, or not within its length, a hash of them ends it.
    Raises UserError.
    """
    parts, exact = [], True
    for key, value in values.items():
        text, whole = _value_text(value)
        parts.append(f"{tails[key]}_{text}")
        exact = exact and whole
    name = f"{check_run_name(sweep)}-{re.sub('[^A-Za-z0-9._-]', '_', '-'.join(parts))}"
    if exact and len(name) <= _LONGEST_NAME:
        return check_run_name(name)
    digest = hashlib.sha256(canonical_json(dict(values)).encode()).hexdigest()[:_HASH_DIGITS]
    return check_run_name(f"{name[: _LONGEST_NAME - _HASH_DIGITS - 1]}-{digest}")


def plain_value(value: Any) -> str:
    """A value of a grid for people: 3e-05, 1,000,000 without the commas, [1, 3]."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return one_line(_number_text(value) if isinstance(value, float) else str(value), 60)


def _value_text(value: Any) -> tuple[str, bool]:
    """A value for a run's name, and whether no other value is written alike."""
    if isinstance(value, list | tuple):
        whole = bool(value) and all(isinstance(item, int) and item >= 0 for item in value)
        return "-".join(_value_text(item)[0] for item in value) or "empty", whole
    if isinstance(value, str):
        text = re.sub("[^A-Za-z0-9._]", "_", value)[:_LONGEST_TEXT]
        return text or "empty", text == value and bool(text)
    return plain_value(value).replace("+", ""), True


def _number_text(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _check_overlap(grid: Grid, overrides: Mapping[str, Any]) -> None:
    """Raises UserError where two keys are about the same: which of them counts would be a matter of their order."""
    for key in grid:
        if key in overrides:
            raise UserError(f"'{one_line(key, 60)}' is given by --grid and by --set; leave one of them out")
        inside = [other for other in (*grid, *overrides) if other.startswith(f"{key}.")]
        if inside:
            raise UserError(f"--grid {one_line(key, 60)} replaces {one_line(inside[0], 60)}; give only one of them")


def _check_sweepable(recipe: Recipe, key: str) -> None:
    """Raises UserError for a key whose values make the same products, or that says where something lies."""
    if key.partition(".")[0] in _ABOUT:
        raise UserError(f"--grid {key}: it describes the recipe and changes nothing of the result; use --set")
    node: Any = recipe
    for part in key.split("."):
        field = type(node).model_fields.get(part) if isinstance(node, BaseModel) else None
        marks = [mark for mark in field.metadata if isinstance(mark, Undigested | Reads)] if field else []
        marks = [mark for mark in marks if isinstance(mark, Reads) or not mark.unless(getattr(node, part))]
        if any(isinstance(mark, Reads) or mark is PLACE for mark in marks):
            raise UserError(
                f"--grid {key}: it names a place to read from; the members of a sweep read the same: make a sweep for "
                "each place, with --set"
            )
        if marks:
            raise UserError(
                f"--grid {key}: it changes memory, speed or what is recorded, not the result, so all members would be "
                "one; use --set"
            )
        node = _part(node, part)


def _resolved(recipe: Recipe, key: str, given: Any) -> Any:
    """The value of a key in a recipe, as JSON has it; the given one where the recipe has no such place."""
    *parents, last = key.split(".")
    node: Any = recipe
    for part in parents:
        node = _part(node, part)
    if isinstance(node, BaseModel) and last in type(node).model_fields:
        value = node.model_dump(mode="json")[last]
        return given if isinstance(value, dict) else value
    return node.get(last, given) if isinstance(node, Mapping) else given


def _part(node: Any, part: str) -> Any:
    return node.get(part) if isinstance(node, Mapping) else getattr(node, part, None)


def _check_distinct(grid: Grid, members: Sequence[Member]) -> None:
    """Raises UserError for a value that is listed twice, however it is written, and for names that meet."""
    for key, values in grid.items():
        known = {canonical_json(member.values[key]): member.values[key] for member in members}
        if len(known) < len(values):
            written = [canonical_json(_value_at(members, grid, key, index)) for index in range(len(values))]
            twice = next(text for text in written if written.count(text) > 1)
            raise UserError(f"--grid {key}: the value {plain_value(known[twice])} is listed twice; leave one out")
    names = [member.name for member in members]
    twice_named = next((name for name in names if names.count(name) > 1), None)
    if twice_named is not None:
        raise UserError(f"two members of the grid would be the run '{twice_named}'; write their values differently")


def _value_at(members: Sequence[Member], grid: Grid, key: str, index: int) -> Any:
    """What the index-th value of a key became in the members."""
    stride = 1
    for other in reversed(list(grid)):
        if other == key:
            break
        stride *= len(grid[other])
    return members[index * stride].values[key]
