"""What the judges of a run found, each number with its error and the direction in which it is better; what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.stages import EVALUATE, NEEDLE, TRAINING_STAGES

# Metric of a manifest → heading, and whether more of it is better.
_SCORES = {
    EVALUATE.name: {
        "kl": ("KL", False),
        "bits_per_byte_ratio": ("bits per byte ratio", False),
        "top1_agreement": ("top-1 agreement", True),
        "relative_score": ("benchmarks over chance", True),
        "student/instructions": ("instructions obeyed", True),
    },
    NEEDLE.name: {"student/needle": ("needle", True), "student/ruler": ("RULER", True)},
}
_STUDENT = "student/"
_STDERR = "_stderr"
_NATS_RATIO = "nats_ratio/"  # and a temperature
_MORE_IS_BETTER = ("acc", "exact_match", "f1", "bleu", "rouge", "mcc", "pass@")
_LESS_IS_BETTER = ("perplexity", "bits_per_byte", "loss", "ter")


@dataclass(frozen=True)
class Score:
    """A number. stderr: its standard error; None where the judge gives none. more_is_better: None if not known."""

    heading: str
    value: float
    stderr: float | None
    more_is_better: bool | None


def scores_of(made: Mapping[str, Manifest]) -> list[Score]:
    """What the judges found. made: stage → its product, of one run."""
    found: list[Score] = []
    for stage, known in _SCORES.items():
        metrics = made[stage].metrics if stage in made else {}
        found += [_score(metrics, name, *known[name]) for name in known if name in metrics]
        ratios = [name for name in metrics if name.startswith(_NATS_RATIO) and not name.endswith(_STDERR)]
        found += [_score(metrics, name, f"nats ratio, {name.removeprefix(_NATS_RATIO)}", False) for name in ratios]
        tasks = [name for name in metrics if name.startswith(_STUDENT) and name.count("/") > 1]
        for name in tasks if stage == EVALUATE.name else []:
            if not name.endswith(_STDERR):
                found.append(_score(metrics, name, name.removeprefix(_STUDENT), _direction(name)))
    return found


def last_loss(made: Mapping[str, Manifest]) -> list[Score]:
    """The loss of the last stage that trained: all there is to compare where nothing is judged."""
    trained = [stage for stage in TRAINING_STAGES if stage in made and "loss" in made[stage].metrics]
    return [Score(f"{stage} loss", float(made[stage].metrics["loss"]), None, False) for stage in trained[-1:]]


def heldout_losses(made: Mapping[str, Manifest]) -> list[Score]:
    """The held-out loss at the end of each training stage, else its last loss."""
    found = []
    for stage in TRAINING_STAGES:
        metrics = made[stage].metrics if stage in made else {}
        for name, what in (("heldout/loss", "held-out loss"), ("loss", "last loss")):
            if isinstance(metrics.get(name), int | float):
                found.append(Score(f"{stage} {what}", float(metrics[name]), None, False))
                break
    return found


def hours_of(own: Sequence[Manifest]) -> float | None:
    """Hours of the jobs that made some products; None if no product says."""
    seconds = [float(manifest.metrics["seconds"]) for manifest in own if "seconds" in manifest.metrics]
    return sum(seconds) / 3600 if seconds else None


def gpu_hours_of(own: Sequence[Manifest], planned: Mapping[str, Mapping[str, Any]]) -> float | None:
    """GPU hours of the jobs that made some products, as their report says them; None without a GPU. planned: label →
    the plan's numbers."""
    hours = []
    for manifest in own:
        metrics, numbers = manifest.metrics, planned.get(manifest.stage, {})
        if metrics.get("gpu_hours"):
            hours.append(float(metrics["gpu_hours"]))
        elif numbers.get("gpu_hours") is not None and "seconds" in metrics:
            hours.append(float(metrics["seconds"]) * float(metrics.get("processes", 1)) / 3600)
    return sum(hours) if hours else None


def _score(metrics: Mapping[str, Any], name: str, heading: str, direction: bool | None) -> Score:
    error = metrics.get(f"{name}{_STDERR}")
    known = isinstance(error, int | float) and math.isfinite(error)
    return Score(heading, float(metrics[name]), float(error) if known and error is not None else None, direction)


def _direction(name: str) -> bool | None:
    """Whether more of a task's metric is better, by its name; None for one that is not known."""
    metric = name.rsplit("/", 1)[-1]
    if any(word in metric for word in _LESS_IS_BETTER):
        return False
    return True if metric.startswith(_MORE_IS_BETTER) else None
