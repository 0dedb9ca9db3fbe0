"""Finds and reads the files of `evaluate.suite`, one a task, and a second one for tasks with examples in the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import COMPRESSED
from radlads.tasks.jobs.data.text.text_files import JSON_SUFFIXES, json_rows, open_text
from radlads.tasks.jobs.judge.suite.columns import Columns

_ENDINGS = f"(?:{'|'.join(map(re.escape, JSON_SUFFIXES))})(?:{'|'.join(map(re.escape, COMPRESSED))})?"
_ITEMS = r"(?:_test|_validation|_\d+)?"
_EXAMPLES = "_(?:train|dev)"


OTHER_STEMS = {"openbookqa": ("openbook_qa",)}
"""Task → other names of its files than its own."""


def count_items(folder: Path, task: str) -> int:
    """Items in a task's file. Raises UserError where there is none, or it cannot be read."""
    return sum(1 for _ in _objects(items_file(folder, (task, *OTHER_STEMS.get(task, ())))))


def items_file(folder: Path, stems: tuple[str, ...]) -> Path:
    """The file of a task's items: `STEM.jsonl`, `STEM_test.jsonl.gz`, ... Raises UserError unless there is one."""
    found = _files(folder, stems, _ITEMS)
    if not found:
        raise UserError(
            f"{folder} has no {stems[0]}.jsonl (or .json, .ndjson, also .gz, .xz, .zst); add it, or leave the task out "
            "of `tasks`"
        )
    return _only(found, "items")


def examples_file(folder: Path, stems: tuple[str, ...]) -> Path | None:
    """The file of examples for prompts: `STEM_train.jsonl`, `STEM_dev.jsonl`, ..., or None. Raises UserError."""
    found = _files(folder, stems, _EXAMPLES)
    return _only(found, "examples") if found else None


def _files(folder: Path, stems: tuple[str, ...], part: str) -> list[Path]:
    pattern = re.compile(f"(?:{'|'.join(stems)}){part}{_ENDINGS}")
    return sorted(path for path in folder.iterdir() if path.is_file() and pattern.fullmatch(path.name))


def _only(found: list[Path], what: str) -> Path:
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} could both hold the {what}; keep one of them there")
    return found[0]


def read_rows(path: Path, forms: tuple[type[Columns], ...]) -> tuple[list[dict[str, Any]], type[Columns]]:
    """All rows in the harness's columns, and the form that they had. Raises UserError for a row of another form."""
    rows: list[dict[str, Any]] = []
    chosen: type[Columns] | None = None
    for number, row in _objects(path):
        if chosen is None:
            chosen = next((form for form in forms if form.model_fields.keys() <= row.keys()), None)
        missing = [name for name in chosen.model_fields if name not in row] if chosen is not None else []
        if chosen is None or missing:
            wanted = " or ".join(", ".join(form.model_fields) for form in forms)
            raise UserError(f"{path}, item {number}: has the columns {', '.join(row)}; needed are {wanted}")
        rows.append(_converted(row, chosen, f"{path}, item {number}"))
    if chosen is None:
        raise UserError(f"{path} has no items")
    return rows, chosen


def _converted(row: dict[str, Any], form: type[Columns], where: str) -> dict[str, Any]:
    try:
        return form.model_validate(row).row()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(": ".join((where, *(str(part) for part in first["loc"][:1]), said))) from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object): one a line, or those in all lists of one JSON object, {split: [...]}."""
    splits = _one_object(path)
    if splits is None:
        yield from enumerate((row for _, row in json_rows(path)), 1)
        return
    lists = {name: split for name, split in splits.items() if isinstance(split, list)}
    if trained := [name for name in lists if name.startswith("train")]:
        raise UserError(f"{path}: all lists of a JSON object are judged, and {trained[0]} is for training; take it out")
    items = [item for split in lists.values() for item in split]
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{path}, item {number}: expected a JSON object with columns")
        yield number, item


def _one_object(path: Path) -> dict[str, Any] | None:
    """The object of a file that is not JSON lines; its first line is an opening brace alone."""
    with open_text(path) as stream:
        if stream.readline().strip() != "{":
            return None
    try:
        with open_text(path) as stream:
            whole: dict[str, Any] = json.load(stream)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    return whole
