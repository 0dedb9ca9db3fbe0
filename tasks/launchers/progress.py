"""Reads the files that a running job writes to its scratch folder: progress, last numbers, log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOG_LINES = 15
_LONGEST_LINE = 300


@dataclass(frozen=True)
class Progress:
    """The progress of a running job, and its last numbers."""

    done: float
    total: float
    unit: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    events: tuple[str, ...] = ()
    """What the watch of a training job noticed so far, a line each."""


class Watcher:
    """Reads progress.json and the end of metrics.jsonl, and passes changes on."""

    def __init__(self, scratch: Path, report: Callable[[Progress], None] | None) -> None:
        self._scratch, self._report = scratch, report
        self.last: Progress | None = None
        """The last progress that was read."""

    def look(self) -> None:
        """Read the files; pass on a change."""
        written = read_json(self._scratch / "progress.json")
        if written is None:
            return
        progress = Progress(
            done=float(written["done"]),
            total=float(written["total"]),
            unit=str(written["unit"]),
            metrics=_last_metrics(self._scratch / "metrics.jsonl"),
            events=tuple(written.get("events", ())),
        )
        if progress != self.last:
            self.last = progress
            if self._report is not None:
                self._report(progress)


def _last_metrics(path: Path) -> dict[str, float]:
    lines = _last_lines(path, 0, 4096)
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "event" not in row:
            return {key: value for key, value in row.items() if key != "time" and isinstance(value, int | float)}
    return {}


def log_end(log: Path, begin: int) -> list[str]:
    """The last lines of a log after byte `begin`."""
    lines = [line[:_LONGEST_LINE] for line in _last_lines(log, begin, 32768) if line.strip()]
    return [f"  {line}" for line in lines[-_LOG_LINES:]] or ["  (it is empty)"]


def _last_lines(path: Path, begin: int, size: int) -> list[str]:
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(max(begin, path.stat().st_size - size))
        return stream.read().decode(errors="replace").splitlines()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none, or none yet."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
