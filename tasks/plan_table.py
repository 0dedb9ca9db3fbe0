"""A plan as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radlads.tasks.contracts.specs import PlanReport

_GIB = 1024**3
_PARTS = {
    "train": "training", "start": "start-up", "heldout": "held-out passes", "export": "export", "judge": "judging",
}  # fmt: skip


def plan_rows(report: PlanReport) -> list[dict[str, str]]:
    """The plan as a table: one row per stage that computes on the device, its phases below it, sizes with units. Empty
    columns are left out.

    student, teacher: GiB of weights on each device; adam: gradients and optimizer; rest: activations, logits, buffers;
    host: GiB of host memory of each process, for an offloaded optimizer, an export under ZeRO-3 or a checkpoint's copy.
    """
    rows = []
    for stage, numbers in report.stages.items():
        if "memory_bytes_per_gpu" not in numbers:
            continue
        rows.append(_row(stage, numbers))
        rows += [_row(f"· phase {number}", part) for number, part in enumerate(numbers.get("phases", ()), 1)]
    used = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    return [{name: row[name] for name in used} for row in rows]


def _row(stage: str, numbers: dict[str, Any]) -> dict[str, str]:
    memory = numbers.get("memory_bytes_per_gpu") or {}
    student, teacher = memory.get("weights", 0), memory.get("teacher", 0)
    adam = memory.get("gradients", 0) + memory.get("optimizer", 0)
    total = memory.get("total", 0)
    return {
        "stage": stage,
        "tokens": short_count(numbers.get("tokens")),
        "steps": _count(numbers.get("steps")),
        "context": _count(numbers.get("context")),
        "batch": _count(numbers.get("batch")),
        "student": _gib(student),
        "teacher": _gib(teacher),
        "adam": _gib(adam),
        "rest": _gib(total - student - teacher - adam),
        "GiB": _gib(total),
        "host": _gib(max(memory.get("host", 0), numbers.get("checkpoint", {}).get("host_bytes", 0))),
        "time": short_duration(numbers["seconds"]) or "too long",
        "GPU h": _hours(numbers.get("gpu_hours")),
        "$": "" if numbers.get("dollars") is None else f"{numbers['dollars']:,.0f}",
    }


def time_lines(report: PlanReport) -> list[str]:
    """What the time of all stages consists of, in one line, and where the speed of training comes from: a line each."""
    totals: dict[str, float] = {}
    sources: dict[str, list[str]] = {}
    for stage, numbers in report.stages.items():
        if numbers["seconds"] is None:
            continue
        for part, seconds in numbers.get("seconds_by", {stage: numbers["seconds"]}).items():
            totals[part] = totals.get(part, 0.0) + seconds
        for source in numbers.get("speed", ()):
            share = "" if numbers.get("mfu") is None else f" {numbers['mfu']:.0%} of peak"
            sources.setdefault(source, []).append(f"{stage}{share}")
    words = [f"{_PARTS.get(part, part)} {short_duration(seconds)}" for part, seconds in totals.items() if seconds >= 1]
    return [", ".join(words), *(f"{', '.join(stages)}: {source}" for source, stages in sources.items())]


def short_count(value: float | None) -> str:
    """1,500,000,000 as 1.5B; exact below ten thousand; "" for None."""
    if value is None:
        return ""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:,.0f}{unit}"
    return f"{value:,.0f}"


def _gib(size: int) -> str:
    """Two decimals below ten, none above a hundred; "" for None."""
    value = size / _GIB
    return "" if size <= 0 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _hours(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def short_duration(seconds: float | None) -> str:
    """Seconds below ninety, minutes below ninety, then hours; "" for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
