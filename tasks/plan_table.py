"""A plan as a table for people."""

from __future__ import annotations

from typing import Any

from radlads.tasks.specs import PlanReport


def plan_rows(report: PlanReport) -> list[dict[str, str]]:
    """The plan as a table, a stage a row; sizes for people to read."""
    rows = []
    for stage, numbers in report.stages.items():
        memory = (numbers.get("memory_bytes_per_gpu") or {}).get("total")
        rows.append(
            {
                "stage": stage,
                "tokens": _count(numbers.get("tokens")),
                "steps": _count(numbers.get("steps")),
                "context": _count(numbers.get("context")),
                "batch": _count(numbers.get("batch")),
                "memory per process": f"{memory / 2**30:.2f} GiB" if memory else "",
                "time": _duration(numbers.get("seconds")),
            }
        )
    return rows


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
