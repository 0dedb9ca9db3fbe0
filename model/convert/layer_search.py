"""Which layers get their softmax attention back by what that gains: one at a time, greedily, or in pairs.

Pure functions from scores to layers, counted from 0. Ties go to the lower layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from radlads.tasks.contracts.errors import UserError

Layers = tuple[int, ...]
"""In ascending order."""
Search = Literal["one_at_a_time", "greedy", "pairs"]


@dataclass(frozen=True)
class LayerScore:
    """Scores of a student with some layers restored."""

    recall: float
    """Mean log-probability of an answer's token, nats; the facts and their questions precede it."""
    accuracy: float
    """Share of the answers all of whose tokens are the most likely ones."""
    kl: float
    """KL(teacher ‖ student) on held-out text, nats a token."""


Scorer = Callable[[Sequence[Layers]], Mapping[Layers, LayerScore]]
"""Sets of restored layers → the student with each; () is the student as it is."""


@dataclass(frozen=True)
class Round:
    """One step of a search."""

    kept: Layers
    """Restored in all that this round measured."""
    before: LayerScore
    """With them alone."""
    scores: dict[Layers, LayerScore]
    """Layers → the student with them restored as well."""
    values: dict[Layers, float]
    """Layers → recall gained per KL."""
    chosen: Layers
    """By this round; none by the first of `pairs`."""


def search_layers(
    score: Scorer, count: int, layers: Sequence[int], *, search: Search = "greedy", candidates: int | None = None
) -> tuple[Layers, list[Round]]:
    """`count` of the layers, in ascending order, and the rounds of the search. A value is `recall_per_kl`.

    one_at_a_time: the layers of the largest values alone. greedy (forward selection): round by round the layer of the
    largest value, all former choices restored in what is measured; after the first round only the `candidates` (None:
    all) of the largest values known are measured again. Two layers that restore the same recall are not both chosen.
    pairs: all pairs of the `candidates` layers of the largest values v(i) alone are measured, without other layers; of
    all sets S of `count` of them that is chosen whose Σ v(i) + Σ [v(i, j) - v(i) - v(j)] over its layers and pairs is
    largest: the value that S has if no three layers interact, for two layers the measured one. Found by trying all.
    Raises UserError.
    """
    if not 0 < count <= len(layers):
        raise UserError(f"{count} of {len(layers)} candidate layers cannot be chosen")
    layers = sorted(layers)
    if search == "greedy":
        return _greedy(score, count, layers, candidates)
    alone, values = _measured(score, (), [(layer,) for layer in layers])
    if search == "one_at_a_time":
        chosen = tuple(sorted(_best(values, layers, count)))
        return chosen, [Round((), *alone, values, chosen)]
    if candidates is None or not count <= candidates:
        raise UserError(f"pairs of {candidates} candidates are too few to choose {count} layers")
    pool = sorted(_best(values, layers, candidates))
    together, pair_values = _measured(score, (), list(combinations(pool, 2)))
    chosen = max(combinations(pool, count), key=lambda found: _second_order(found, values | pair_values))
    return chosen, [Round((), *alone, values, ()), Round((), *together, pair_values, chosen)]


def recall_per_kl(before: LayerScore, after: LayerScore) -> float:
    """Recall gained, in nats a token of the answer, per nat of held-out KL that the restored student still has.

    The divisor is the remaining KL, not the reduction of KL (the ratio of drops in 2601.22156): the reduction is a
    small difference that can be zero or negative, the remaining KL is positive, and a larger reduction still scores
    higher. A loss of recall is multiplied by the KL, so that it counts more with a larger KL.
    """
    gained = after.recall - before.recall
    if not (math.isfinite(gained) and math.isfinite(after.kl)):
        return -math.inf
    kl = max(after.kl, 1e-6)
    return gained / kl if gained > 0 else gained * kl


def _greedy(score: Scorer, count: int, layers: Sequence[int], candidates: int | None) -> tuple[Layers, list[Round]]:
    kept, rounds, latest = Layers(), list[Round](), dict.fromkeys([(layer,) for layer in layers], 0.0)
    for _ in range(count):
        left = [layer for layer in layers if layer not in kept]
        if rounds and candidates is not None:
            left = sorted(_best(latest, left, candidates))
        measured, values = _measured(score, kept, [(layer,) for layer in left])
        latest |= values
        chosen = _best(values, left, 1)
        rounds.append(Round(kept, *measured, values, chosen))
        kept = tuple(sorted((*kept, *chosen)))
    return kept, rounds


def _measured(
    score: Scorer, kept: Layers, added: Sequence[Layers]
) -> tuple[tuple[LayerScore, dict[Layers, LayerScore]], dict[Layers, float]]:
    """((score before, scores of what is added), values)."""
    whole = {more: tuple(sorted((*kept, *more))) for more in added}
    found = score([kept, *whole.values()])
    scores = {more: found[restored] for more, restored in whole.items()}
    return (found[kept], scores), {more: recall_per_kl(found[kept], one) for more, one in scores.items()}


def _best(values: Mapping[Layers, float], layers: Sequence[int], count: int) -> Layers:
    return tuple(sorted(layers, key=lambda layer: (-values[layer,], layer))[:count])


def _second_order(chosen: Layers, values: Mapping[Layers, float]) -> float:
    single = [values[layer,] for layer in chosen]
    pairs = [(values[i, j], values[i,] + values[j,]) for i, j in combinations(chosen, 2)]
    total = sum(single) + sum(both - apart for both, apart in pairs)
    return total if all(map(math.isfinite, (*single, *(both for both, _ in pairs)))) else -math.inf
