"""RULER's scores: by task and length, by group of tasks, and their means."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from radlads.tasks.contracts.recipe.judging.ruler import Ruler, RulerTask
from radlads.tasks.jobs.data.ruler.tasks import GROUPS, TASKS, score
from radlads.tasks.jobs.judge.needle_grid import put_ratio, rate
from radlads.tasks.jobs.judge.ruler.prompts import RulerTrial

_SHOWN = 300  # characters of an answer in the examples

Scores = dict[tuple[RulerTask, int], list[float | None]]
"""Task and length → a score for each prompt, in order; None: not run."""


def ruler_sheet(
    asked: Ruler, trials: Sequence[RulerTrial], replies: Mapping[str, Sequence[str | None]]
) -> dict[str, Any]:
    """{tasks, left_out, lengths, samples, chat, cells, models, examples}.

    replies: model → its answers in the order of the trials; None: not run. cells: [{task, length, <model>: {mean,
    stderr, trials}}]. models: model → {mean, stderr, trials, by_length, by_group, not_run}, every task with the same
    weight; a length at which one prompt was not run counts nowhere.
    """
    scores = {name: _scores(trials, texts) for name, texts in replies.items()}
    return {
        "tasks": list(asked.judged),
        "left_out": asked.left_out,
        "lengths": sorted(set(asked.lengths)),
        "samples": asked.samples,
        "chat": asked.chat,
        "models": {name: _summary(own) for name, own in scores.items()},
        "cells": [
            {"task": task, "length": length} | {name: rate(own[task, length]) for name, own in scores.items()}
            for task, length in next(iter(scores.values()))
        ],
        "examples": _examples(trials, replies),
    }


def _scores(trials: Sequence[RulerTrial], texts: Sequence[str | None]) -> Scores:
    scores: Scores = {}
    for trial, text in zip(trials, texts, strict=True):
        value = None if text is None else score(trial.task, text, trial.answers)
        scores.setdefault((trial.task, trial.length), []).append(value)
    return scores


def _summary(scores: Scores) -> dict[str, Any]:
    tasks = list(dict.fromkeys(task for task, _ in scores))
    by_length = {length: _mean(scores, tasks, [length]) for length in dict.fromkeys(length for _, length in scores)}
    run = [length for length, cell in by_length.items() if cell is not None]
    groups = {group: [task for task in tasks if TASKS[task].group == group] for group in GROUPS}
    return {
        **(_mean(scores, tasks, run) or {"mean": None, "stderr": None, "trials": 0}),
        "by_length": {str(length): cell for length, cell in by_length.items()},
        "by_group": {group: _mean(scores, own, run) for group, own in groups.items() if own},
        "not_run": [length for length in by_length if length not in run],
    }


def _mean(scores: Scores, tasks: Container[str], lengths: Container[int]) -> dict[str, Any] | None:
    return rate([one for (task, n), values in scores.items() if task in tasks and n in lengths for one in values])


def _examples(trials: Sequence[RulerTrial], replies: Mapping[str, Sequence[str | None]]) -> list[dict[str, Any]]:
    """The first prompt of each task and length: what was expected, and the beginning of each model's answer."""
    firsts = {(trial.task, trial.length): index for index, trial in reversed(list(enumerate(trials)))}
    return [
        {
            "task": trials[index].task,
            "length": trials[index].length,
            "expected": list(trials[index].answers),
            "prompt_tokens": len(trials[index].prompt.ids),
        }
        | {name: (texts[index] or "")[:_SHOWN] for name, texts in replies.items()}
        for index in sorted(firsts.values())
    ]


def flatten_ruler(sheet: Mapping[str, Any]) -> dict[str, float]:
    """The numbers under their MLflow names: `student/ruler`, `student/ruler/4096`, `student/ruler/multikey`,
    `student/ruler/vt/4096`, `ruler_ratio`."""
    flat: dict[str, float] = {}
    for name, numbers in sheet["models"].items():
        if numbers["mean"] is None:
            continue
        flat |= {f"{name}/ruler": numbers["mean"], f"{name}/ruler_stderr": numbers["stderr"]}
        parts = {**numbers["by_length"], **numbers["by_group"]}
        parts |= {f"{cell['task']}/{cell['length']}": cell[name] for cell in sheet["cells"]}
        flat |= {f"{name}/ruler/{part}": cell["mean"] for part, cell in parts.items() if cell}
    teacher, student = (sheet["models"].get(name) for name in ("teacher", "student"))
    if teacher and student:
        both = [n for n, cell in teacher["by_length"].items() if cell and student["by_length"][n]]
        put_ratio(flat, "ruler_ratio", teacher, student, both)
    return flat
