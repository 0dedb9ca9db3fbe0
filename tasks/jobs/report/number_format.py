"""Number formats for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"


def plain(value: float | None, digits: int | None = None) -> str:
    """1.2346, 123.46, 1,234,568, or a dash for None. digits: decimal places, by magnitude if None."""
    if value is None:
        return NONE
    return f"{value:,.{_digits(value) if digits is None else digits}f}"


def measured(estimate: Mapping[str, float | None] | None) -> str:
    """1.2346 ± 0.0012, with equal decimal places."""
    if estimate is None or estimate["value"] is None:
        return NONE
    value, error = estimate["value"], estimate.get("stderr")
    digits = _digits(value)
    return plain(value, digits) if error is None else f"{plain(value, digits)} ± {plain(error, digits)}"


def _digits(value: float) -> int:
    return 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0


def percent(value: float | None, digits: int = 1) -> str:
    """97.3 %."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def ratio(estimate: Mapping[str, float | None] | None) -> str:
    """× 1.0234 ± 0.0012."""
    shown = measured(estimate)
    return shown if shown == NONE else f"× {shown}"


def share(estimate: Mapping[str, float | None]) -> str:
    """97.3 % ± 0.4."""
    value, error = estimate["value"], estimate["stderr"]
    return percent(value) if value is None or error is None else f"{percent(value)} ± {100 * error:.1f}"


def rate_of(cell: Mapping[str, float] | None) -> str:
    """80 % ± 7 for a needle cell, or "not run"."""
    if not cell:
        return "not run"
    return f"{100 * cell['mean']:.0f} % ± {100 * cell['stderr']:.0f}"


def times(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> str:
    """× 0.95 of two needle cells; a dash where the teacher's is 0 or one was not run."""
    if not theirs or not ours or not theirs["mean"] or ours["mean"] is None:
        return NONE
    return f"× {ours['mean'] / theirs['mean']:.2f}"


def count(value: float | None) -> str:
    """12,345."""
    return NONE if value is None else f"{round(value):,}"


def duration(seconds: float | None) -> str:
    """42 s, 3.5 min, 2.1 h."""
    if seconds is None:
        return NONE
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gibibytes(size: float | None) -> str:
    """1.25 GiB."""
    return NONE if size is None else f"{size / 1024**3:.2f} GiB"


def dollars(value: float | None) -> str:
    """$12.30."""
    return NONE if value is None else f"${value:,.2f}"


def prompt_note(task: Mapping[str, Any]) -> str:
    """Whether the prompts of a task begin with BOS, which is needed to compare its scores with published ones."""
    if "begins_with_bos" not in task:
        return ""
    way = "the tokenizer's default" if task["add_bos"] is None else "as set by evaluate.add_bos"
    return f"Prompts begin {'with' if task['begins_with_bos'] else 'without'} BOS, {way}."
