"""The recall gate: recall that was lost is the first thing that a report says. Finetuning can erase it without a
change in loss (2606.11052)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from radlads.tasks.jobs.report.number_format import percent
from radlads.tasks.jobs.report.report_blocks import Verdict

POINTS = 0.02
"""A loss of more than this share is reported."""
_TEACHER, _STUDENT = "teacher", "student"


def recall_gate(needle: Mapping[str, Any] | None) -> list[Verdict]:
    """One warning if the student's needles or RULER are more than 2 points below its teacher's, or below those of an
    earlier stage that was judged with it; else none. Compared at the lengths at which both were run."""
    if needle is None:
        return []
    judged = {"needles": needle["models"]} | ({"RULER": needle["ruler"]["models"]} if needle.get("ruler") else {})
    losses = [
        loss
        for what, models in judged.items()
        for name in models
        if name != _STUDENT and (loss := _loss(what, name, models[name], models[_STUDENT]))
    ]
    if not losses:
        return []
    return [
        Verdict(
            "warning",
            f"Recall gate: the student lost more than {100 * POINTS:.0f} points of recall: {'; '.join(losses)}. "
            "`finetune` can mix recall text into its data (a source `kind: recall` with a `weight`); more softmax "
            "layers (`student.attention_layers`) help too.",
        )
    ]


def _loss(what: str, name: str, before: Mapping[str, Any], student: Mapping[str, Any]) -> str | None:
    """What the student lost against another model, in words; None if at most 2 points, or not comparable."""
    both = [n for n, cell in before["by_length"].items() if cell and student["by_length"].get(n)]
    if not both:
        return None
    theirs, their_error = _mean([before["by_length"][n] for n in both])
    ours, our_error = _mean([student["by_length"][n] for n in both])
    drop, error = theirs - ours, math.hypot(their_error, our_error)
    if drop <= POINTS + 1e-9:
        return None
    whose = "teacher" if name == _TEACHER else f"after {name}, so what followed it caused this"
    sure = "" if drop > 2 * error else ", within two standard errors"
    points = f"−{100 * drop:.1f} ± {100 * error:.1f} points{sure}"
    return f"{what} {percent(ours)}, not {percent(theirs)} ({points}; {whose})"


def _mean(cells: list[Mapping[str, float]]) -> tuple[float, float]:
    """(mean, standard error) of cells with the same number of trials."""
    error = math.sqrt(sum(cell["stderr"] ** 2 for cell in cells)) / len(cells)
    return sum(cell["mean"] for cell in cells) / len(cells), error
