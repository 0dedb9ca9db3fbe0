"""The table of measured speeds: rows of `benchmarks/training.py --record`, and others of benchmarks/results."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.job import Sheet
from radlads.tasks.jobs.plan.timing.step_time import Work

TABLE = Path(__file__).with_name("speeds.json")
CPU = "CPU"


class SpeedRow(Sheet):
    """One measured run."""

    kind: str
    """Key of GPU_KINDS, or CPU."""
    shape: str
    """Name of the model that was trained, and how many of its layers where it was cut."""
    work: Work
    tokens_per_second: float
    """Of one device."""
    peak_gib: float | None = None
    """Memory that was allocated on the GPU, the largest of all ranks."""
    startup_seconds: float | None = None
    """From the launch of the job to its first step."""
    stall_seconds: float | None = None
    """Training stands still for a checkpoint."""
    date: str
    command: str
    file: str
    """Page of results that has the run."""
    case: dict[str, Any] | None = None
    """Settings of benchmarks/training.py, for plan_check.py; None: made by another program."""
    liger: bool = True
    """Whether liger-kernel was installed."""

    @property
    def step_seconds(self) -> float:
        """Of an optimizer step."""
        return self.work.step_tokens / self.tokens_per_second

    def __str__(self) -> str:
        gpus = "" if self.work.devices == 1 or self.kind == CPU else f"{self.work.devices} × "
        return f"{gpus}{self.kind}, {self.shape}, {self.work.stage}, context {self.work.context:,}"


@cache
def measured_rows() -> tuple[SpeedRow, ...]:
    """The rows of the table that is part of the package."""
    return read_rows(TABLE)


def read_rows(path: Path) -> tuple[SpeedRow, ...]:
    """The rows of a table."""
    return tuple(SpeedRow.model_validate(row) for row in json.loads(path.read_text(encoding="utf-8")))


def record_row(row: SpeedRow, path: Path = TABLE) -> None:
    """Add a row to a table; it replaces an earlier one of the same kind of GPU, shape and work. A file that does not
    exist begins with the rows of the package."""
    kept = [
        one
        for one in read_rows(path if path.is_file() else TABLE)
        if (one.kind, one.shape, one.work) != (row.kind, row.shape, row.work)
    ]
    lines = (json.dumps(one.model_dump(mode="json", exclude_defaults=True)) for one in (*kept, row))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
