"""Runs the benchmarks of `evaluate.suite` for teacher and student."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.suite import EvalSuite
from radlads.tasks.jobs.judge.judged_models import STUDENT, TEACHER
from radlads.tasks.jobs.judge.lmeval import SharedHFLM, flatten, run_loaded
from radlads.tasks.jobs.judge.suite.over_chance import over_chance
from radlads.tasks.jobs.judge.suite.tasks import LocalTask, load_suite

logger = logging.getLogger("radlads")


def check_suite(suite: EvalSuite) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a suite, one line each: its files are read and its tasks are built."""
    tasks, faults = load_suite(suite)
    return faults, [f"evaluate.suite: {task.name}: {note}" for task in tasks for note in task.notes]


def judge_suite(
    lms: Mapping[str, SharedHFLM], suite: EvalSuite, hashes: Mapping[str, str], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Task → {num_fewshot, limit, teacher: {metric: {value, stderr}}, student: {...}, suite}. Collective.

    lms: teacher and student. hashes: file name → sha256. suite: {metric (the main one), items, chance, relative
    (over_chance), files: {name: sha256}, notes}. Raises UserError for files that cannot be used.
    """
    tasks, faults = load_suite(suite)
    if faults:
        raise UserError("\n".join(faults))
    return {task.name: _judge(task, lms, suite.limit, hashes, seed) for task in tasks}


def _judge(
    task: LocalTask, lms: Mapping[str, SharedHFLM], limit: int | None, hashes: Mapping[str, str], seed: int
) -> dict[str, Any]:
    sheet: dict[str, Any] = {"num_fewshot": task.num_fewshot, "limit": limit}
    scores: dict[str, np.ndarray] = {}
    chance = np.zeros(0)
    for name, lm in lms.items():
        results = run_loaded(lm, task.loaded, task.num_fewshot, limit, seed=seed, with_items=True)
        metrics = flatten(task.name, results["results"])
        # Of a group, its own mean over all items; not those of its 57 subjects.
        sheet[name] = {metric: estimate for metric, estimate in metrics.items() if "/" not in metric}
        scores[name], chance = _items(task, results["samples"])
        logger.info("%s on %s: %s", name, task.name, sheet[name])
    sheet["suite"] = {
        "metric": task.benchmark.label,
        **over_chance(scores[TEACHER], scores[STUDENT], chance),
        "files": {name: hashes[name] for name in task.files},
        "notes": list(task.notes),
    }
    return sheet


def _items(task: LocalTask, samples: Mapping[str, list[dict[str, Any]]]) -> tuple[np.ndarray, np.ndarray]:
    """(main score, expected score by guessing) of each item, [items] each; one request of an item for each choice."""
    benchmark = task.benchmark
    items = [item for name in sorted(samples) for item in samples[name] if item["filter"] == benchmark.filter]
    chance = [1 / len(item["arguments"]) if benchmark.guessing else 0.0 for item in items]
    return np.array([float(item[benchmark.metric]) for item in items]), np.array(chance)
