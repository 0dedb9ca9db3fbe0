"""Which layers stay softmax attention, by position or difficulty: pure functions from numbers to layers, from 0 on.

Dims: L layers of the model. Ties go to the lower layer, so that a choice follows from its numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from radlads.tasks.contracts.errors import UserError


def even_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """The last layer, and every s-th before it, s = num_layers // count; the remainder comes first.

    The rule of the published Reka hybrids (44 layers, 6 kept: 8, 15, 22, 29, 36, 43). Raises UserError.
    """
    _check_count(count, num_layers)
    stride = num_layers // count
    return tuple(sorted(num_layers - 1 - stride * i for i in range(count)))


def last_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """The last `count` layers. Raises UserError."""
    _check_count(count, num_layers)
    return tuple(range(num_layers - count, num_layers))


@dataclass(frozen=True)
class DifficultyWeights:
    """What makes a layer hard (rwkv7_variants §5.2), and the prices of an uneven choice."""

    residue: float = 0.30
    convergence: float = 0.25
    alignment: float = 0.20
    scale: float = 0.15
    instability: float = 0.10
    min_gap: int = 1
    max_gap: int = 8
    gap_penalty: float = 0.75
    spread: float = 0.1
    max_consecutive: int = 2


def difficulty_scores(
    curves: Mapping[int, Sequence[float]],
    *,
    ratios: Mapping[int, float] | None = None,
    weights: DifficultyWeights = DifficultyWeights(),
) -> dict[int, float]:
    """Layer → difficulty in [0, 1], the hardest 1. curves: layer → its align loss at every step, all of one length.

    A weighted sum of five parts, each min-max normalised over the layers: the loss at the end; 1 - speed, the slope of
    -log loss over the steps (least squares); 1 - the relative reduction of the loss by the end; |ratio - 1| of
    `ratios`, teacher's over student's output norm; the variance of step-to-step differences. The published tool uses
    the ratio itself, so a layer whose output is too large counts as easy, and it gets NaN. Without ratios their weight
    is shared among the other parts. First and last loss are means over a twentieth of the steps to reduce noise.

    Raises UserError for curves of less than 2 steps, of different lengths, or with values that are not positive
    numbers.
    """
    layers = sorted(curves)
    losses = _matrix(curves, layers)
    steps = np.arange(losses.shape[1], dtype=np.float64)
    few = max(1, losses.shape[1] // 20)
    first, final = losses[:, :few].mean(1), losses[:, -few:].mean(1)
    slopes = np.polyfit(steps, np.log(losses).T, 1)[0]
    parts = [
        (weights.residue, _normalised(final)),
        (weights.convergence, 1 - _normalised(-slopes)),
        (weights.alignment, 1 - _normalised((first - final) / first)),
        (weights.instability, _normalised(np.diff(losses, axis=1).var(1))),
    ]
    if ratios is not None:
        parts.append((weights.scale, _normalised(np.abs(np.array([ratios[layer] for layer in layers]) - 1))))
    total = sum(weight * part for weight, part in parts)
    highest = float(np.max(total))
    return {layer: float(value / highest) if highest else 0.0 for layer, value in zip(layers, total, strict=True)}


def spaced_layers(
    scores: Mapping[int, float],
    count: int,
    *,
    num_layers: int,
    weights: DifficultyWeights = DifficultyWeights(),
) -> tuple[int, ...]:
    """`count` of the scored layers that maximise Σ score - Σ price of the gaps between neighbours; exact.

    A gap is the difference of two neighbours' numbers; its price is gap_penalty where it lies outside min_gap ...
    max_gap, and spread · |gap - ideal| / ideal, ideal = num_layers // (count + 1). Never more than max_consecutive in
    a row. Dynamic programming over (number chosen, last one, length of its row); the published tool uses
    simulated annealing. Raises UserError if no choice satisfies the limit.
    """
    _check_count(count, num_layers)
    layers = sorted(scores)
    ideal = max(1, num_layers // (count + 1))

    def price(gap: int) -> float:
        outside = not weights.min_gap <= gap <= weights.max_gap
        return weights.gap_penalty * outside + weights.spread * abs(gap - ideal) / ideal

    # (last layer, length of its row) → (value, layers); of equal values the layers found first, the lower ones.
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(i, 1): (scores[i], (i,)) for i in layers}
    for _ in range(count - 1):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (last, row), (value, chosen) in sorted(best.items()):
            for layer in layers:
                row_now = row + 1 if layer == last + 1 else 1
                if layer <= last or row_now > weights.max_consecutive:
                    continue
                found = (value + scores[layer] - price(layer - last), (*chosen, layer))
                if (layer, row_now) not in longer or found[0] > longer[layer, row_now][0] + 1e-12:
                    longer[layer, row_now] = found
        best = longer
    if not best:
        raise UserError(
            f"{count} of {len(layers)} layers cannot be kept with at most {weights.max_consecutive} in a row; lower "
            "attention_layers.count, or raise max_consecutive"
        )
    return max(sorted(best.values(), key=lambda found: found[1]), key=lambda found: found[0])[1]


def _matrix(curves: Mapping[int, Sequence[float]], layers: Sequence[int]) -> np.ndarray:
    lengths = {len(curves[layer]) for layer in layers}
    if len(lengths) != 1 or min(lengths) < 2:
        raise UserError(
            f"the align stage recorded {sorted(lengths)} steps of its layers; two or more, of all, are needed"
        )
    losses = np.array([curves[layer] for layer in layers], dtype=np.float64)
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise UserError("the align stage recorded losses that are not positive numbers; layers cannot be ranked")
    return losses


def _normalised(values: np.ndarray) -> np.ndarray:
    """To 0 ... 1 over the layers; 0 where all are alike, but for the rounding of what they were computed by."""
    low, high = values.min(), values.max()
    alike = high - low <= 1e-9 * np.abs(values).max()
    scaled: np.ndarray = np.zeros_like(values) if alike else (values - low) / (high - low)
    return scaled


def _check_count(count: int, num_layers: int) -> None:
    if not 0 < count < num_layers:
        raise UserError(
            f"attention_layers.count is {count}, of {num_layers} layers: keep at least 1, and convert at least 1"
        )
