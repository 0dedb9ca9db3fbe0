"""Scores over chance: what share of the teacher's advantage over guessing the student has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from radlads.tasks.jobs.judge.heldout_scores import mean_of, ratio_of

_CLEAR = 2.0  # standard errors


def over_chance(teacher: np.ndarray, student: np.ndarray, chance: np.ndarray) -> dict[str, Any]:
    """{items, chance, relative} from scores of the same items, [items], and their expected scores by guessing.

    relative: (student − chance) / (teacher − chance), {value, stderr}; the error is of a ratio of paired means, by the
    delta method. None where the teacher is not above chance by two standard errors.
    """
    advantage = mean_of(teacher - chance)
    value, error = advantage["value"], advantage["stderr"]
    clear = value is not None and error is not None and value > _CLEAR * error
    relative = ratio_of(student - chance, teacher - chance) if clear else None
    return {"items": len(chance), "chance": float(chance.mean()), "relative": relative}


def relative_score(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """{value, stderr, tasks, left_out}: the mean of the suite's relative scores; None without a suite.

    tasks: as judge_suite returned them, among others. left_out: names of tasks where the teacher is not clearly above
    chance. value: None where that is all of them. Tasks count equally, and their errors are independent.
    """
    scores = {name: sheet["suite"]["relative"] for name, sheet in tasks.items() if "suite" in sheet}
    if not scores:
        return None
    counted = {name: score for name, score in scores.items() if score is not None}
    value = error = None
    if counted:
        value = sum(score["value"] for score in counted.values()) / len(counted)
        error = math.sqrt(sum(score["stderr"] ** 2 for score in counted.values())) / len(counted)
    left_out = [name for name in scores if name not in counted]
    return {"value": value, "stderr": error, "tasks": list(counted), "left_out": left_out}
