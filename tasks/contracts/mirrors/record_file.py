"""The files of a job's record: metrics.jsonl, a row a line, and the notes beside it. Read by whoever mirrors it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NOT_METRICS = {"step", "time", "event"}
"""Keys of a row beside its numbers."""
BY_TOKENS = "by_tokens/"
"""What the names of curves over tokens begin with."""
_READ_BYTES = 1 << 18


class TokenAxis:
    """Tells how many tokens training had seen at a row. Rows are given in their order."""

    def __init__(self) -> None:
        self._tokens: int | None = None

    def at(self, row: Mapping[str, Any]) -> int | None:
        """Tokens seen; None in a record that does not count them. A row of held-out numbers follows that of its
        optimizer step, which has the count."""
        if row.get("tokens") is not None:
            self._tokens = int(row["tokens"])
        return 0 if row["step"] == 0 else self._tokens


def named(row: Mapping[str, Any], prefix: str, tokens: int | None) -> Iterator[tuple[str, float | None, int]]:
    """(name, value, step) of the curves that a row adds a point to. prefix: as of Repeats. tokens: as of TokenAxis."""
    for name, value in row.items():
        if name not in NOT_METRICS:
            yield f"{prefix}{name}", value, row["step"]
            if tokens is not None and (name == "loss" or name.startswith("heldout/")) and "/layer_" not in name:
                yield f"{prefix}{BY_TOKENS}{name}", value, tokens


def finite(value: float) -> float | None:
    """The number; None where it is none that JSON can hold."""
    number = float(value)
    return number if math.isfinite(number) else None


def parse_rows(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Rows of complete lines, and their size in bytes; an incomplete last line is left out."""
    rows: list[dict[str, Any]] = []
    used = 0
    while (end := data.find(b"\n", used)) >= 0:
        row = _row(data[used:end])
        if row is not None:
            rows.append(row)
        used = end + 1
    return rows, used


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("time"), int)
    return row if whole else None


def read_from(path: Path, offset: int) -> bytes:
    """Some of a file from a byte on; b"" where there is no file or nothing new."""
    if not path.exists():
        return b""
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(_READ_BYTES)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def notes_path(path: Path) -> Path:
    """Where the params and artifacts beside a record are listed."""
    return path.with_name(f"{path.stem}-notes.json")


def read_notes(path: Path) -> dict[str, Any]:
    """The params and artifacts beside a record; {} without any."""
    notes = notes_path(path)
    return dict(json.loads(notes.read_bytes())) if notes.exists() else {}
