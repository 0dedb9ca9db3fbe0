"""Aggregates needle trials: cells, means by length, and lengths that were not run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Hits = Sequence[float | None]
"""One entry per trial, a hit or a score from 0 to 1; None: not run."""


class Placed(Protocol):
    """Coordinates of a trial in the grid."""

    @property
    def length(self) -> int: ...

    @property
    def depth(self) -> float: ...


def make_cells(trials: Sequence[Placed], hits: Mapping[str, Hits]) -> list[dict[str, Any]]:
    """[{length, depth, <model>: {mean, stderr, trials}}]; None for a model not run on every trial of a cell."""
    places = list(dict.fromkeys((trial.length, trial.depth) for trial in trials))
    members = {place: [i for i, t in enumerate(trials) if (t.length, t.depth) == place] for place in places}
    return [
        {"length": length, "depth": depth}
        | {name: rate([results[i] for i in members[length, depth]]) for name, results in hits.items()}
        for length, depth in places
    ]


def summarize(trials: Sequence[Placed], hits: Mapping[str, Hits], training_length: int) -> dict[str, Any]:
    """Model → {mean, stderr, trials, by_length, not_run, at_training_length}.

    mean: over the trials of all completely run lengths. at_training_length: the longest such length that is no longer
    than the training length; None if there is none.
    """
    lengths = sorted({trial.length for trial in trials})
    models: dict[str, Any] = {}
    for name, results in hits.items():
        by_length = {n: rate([h for t, h in zip(trials, results, strict=True) if t.length == n]) for n in lengths}
        run = [n for n in lengths if by_length[n] is not None]
        overall = rate([h for t, h in zip(trials, results, strict=True) if t.length in run]) if run else None
        trained = [n for n in run if n <= training_length]
        models[name] = {
            **(overall or {"mean": None, "stderr": None, "trials": 0}),
            "by_length": {str(n): by_length[n] for n in lengths},
            "not_run": [n for n in lengths if n not in run],
            "at_training_length": {"length": trained[-1], **(by_length[trained[-1]] or {})} if trained else None,
        }
    return models


def rate(hits: Hits) -> dict[str, Any] | None:
    """{mean, stderr, trials}; None if a trial was not run. stderr: of a proportion, by Agresti and Coull, which is not
    zero for all hits or no hits; an upper bound for scores between 0 and 1."""
    count, run = len(hits), [hit for hit in hits if hit is not None]
    if not hits or len(run) < count:
        return None
    successes = sum(run)
    shifted = (successes + 2) / (count + 4)
    return {"mean": successes / count, "stderr": math.sqrt(shifted * (1 - shifted) / (count + 4)), "trials": count}


def flatten(sheet: dict[str, Any]) -> dict[str, float]:
    """The numbers under their MLflow names: `student/needle`, `student/needle/1024`, `needle_ratio`, ..."""
    flat: dict[str, float] = {}
    for name, numbers in sheet["models"].items():
        if numbers["mean"] is None:
            continue
        flat[f"{name}/needle"] = numbers["mean"]
        flat[f"{name}/needle_stderr"] = numbers["stderr"]
        flat |= {f"{name}/needle/{length}": cell["mean"] for length, cell in numbers["by_length"].items() if cell}
        if numbers["at_training_length"]:
            flat[f"{name}/needle_at_training_length"] = numbers["at_training_length"]["mean"]
    teacher, student = (sheet["models"].get(name) for name in ("teacher", "student"))
    if teacher and student:
        both = [n for n, cell in teacher["by_length"].items() if cell and student["by_length"][n]]
        put_ratio(flat, "needle_ratio", teacher, student, both)
        trained = [n for n in both if int(n) <= sheet["training_length"]]
        put_ratio(flat, "needle_at_training_length_ratio", teacher, student, trained[-1:])
    return flat


def put_ratio(flat: dict[str, float], key: str, teacher: Any, student: Any, lengths: list[str]) -> None:
    """Put student / teacher over the given lengths; no entry if the teacher's rate is 0."""
    theirs, ours = (sum(numbers["by_length"][n]["mean"] for n in lengths) for numbers in (teacher, student))
    if theirs:
        flat[key] = ours / theirs
