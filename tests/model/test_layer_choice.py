"""Choosing layers from numbers: the published lists, the difficulty tool against exhaustive search, greedy recall."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads.model.convert.layer_choice import (
    DifficultyWeights,
    difficulty_scores,
    even_layers,
    last_layers,
    spaced_layers,
)
from radlads.model.convert.layer_search import LayerScore, recall_per_kl, search_layers
from radlads.tasks.contracts.errors import UserError


def test_even_is_the_published_reka_list():
    assert even_layers(6, 44) == (8, 15, 22, 29, 36, 43)


def test_even_agrees_with_the_regular_end_of_the_published_32b_list():
    """12 of 64: published 5, 11, 17, 23, 28, 33, ... 63. Its last nine are a stride of 5; the first three are not."""
    published = (5, 11, 17, *range(23, 64, 5))
    assert len(published) == 12
    assert even_layers(12, 64)[-9:] == published[-9:]


@given(st.integers(2, 100).flatmap(lambda layers: st.tuples(st.integers(1, layers - 1), st.just(layers))))
def test_even_and_last_keep_so_many_layers_and_the_last_one(case):
    count, num_layers = case
    for layers in (even_layers(count, num_layers), last_layers(count, num_layers)):
        assert len(set(layers)) == count
        assert layers == tuple(sorted(layers))
        assert 0 <= layers[0] <= layers[-1] == num_layers - 1
    strides = {b - a for a, b in itertools.pairwise(even_layers(count, num_layers))}
    assert strides <= {num_layers // count}


@pytest.mark.parametrize("count", [0, -1, 4, 5])
@pytest.mark.parametrize("way", [even_layers, last_layers])
def test_a_count_that_cannot_be_is_refused(way, count):
    with pytest.raises(UserError, match="at least 1"):
        way(count, 4)


def curve(start, end, speed, noise=0.0, steps=200, seed=0):
    rng = np.random.default_rng(seed)
    smooth = end + (start - end) * np.exp(-speed * np.arange(steps))
    return (smooth * (1 + noise * rng.standard_normal(steps))).tolist()


def test_the_layer_that_learns_worst_is_the_hardest():
    curves = {
        0: curve(1.0, 0.1, 0.05),
        1: curve(1.0, 0.6, 0.005, noise=0.02),
        2: curve(1.0, 0.2, 0.03),
        3: curve(1.0, 0.1, 0.04),
    }
    scores = difficulty_scores(curves)
    assert max(scores, key=scores.get) == 1
    assert scores[1] == 1.0
    assert all(0 <= score <= 1 for score in scores.values())
    assert spaced_layers(scores, 1, num_layers=4) == (1,)


def test_the_scale_term_is_the_distance_from_one():
    """The published tool takes the ratio itself, so that a student four times too loud counts as the easiest."""
    curves = {layer: curve(1.0, 0.5, 0.01) for layer in range(3)}
    scores = difficulty_scores(curves, ratios={0: 1.0, 1: 0.25, 2: 1.1})
    assert scores[1] > scores[2] > scores[0]


def test_without_ratios_the_order_is_that_of_the_other_parts():
    curves = {layer: curve(1.0, 0.1 + 0.1 * layer, 0.05) for layer in range(4)}
    bare = difficulty_scores(curves)
    alike = difficulty_scores(curves, ratios=dict.fromkeys(range(4), 1.3))
    assert bare == pytest.approx(alike)


@pytest.mark.parametrize(
    "curves",
    [
        {0: [1.0], 1: [1.0]},
        {0: [1.0, 0.5], 1: [1.0]},
        {0: [1.0, math.nan], 1: [1.0, 0.5]},
        {0: [1.0, 0.0], 1: [1.0, 1.0]},
    ],
)
def test_curves_that_tell_nothing_are_refused(curves):
    with pytest.raises(UserError, match="the align stage recorded"):
        difficulty_scores(curves)


def value_of(chosen, scores, num_layers, weights):
    ideal = max(1, num_layers // (len(chosen) + 1))
    value = sum(scores[layer] for layer in chosen)
    for a, b in itertools.pairwise(chosen):
        gap = b - a
        value -= weights.gap_penalty * (not weights.min_gap <= gap <= weights.max_gap)
        value -= weights.spread * abs(gap - ideal) / ideal
    return value


def longest_row(chosen):
    longest = row = 1
    for a, b in itertools.pairwise(chosen):
        row = row + 1 if b == a + 1 else 1
        longest = max(longest, row)
    return longest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_solver_is_exact(data):
    num_layers = data.draw(st.integers(3, 11))
    count = data.draw(st.integers(1, min(5, num_layers - 1)))
    scores = dict(enumerate(data.draw(st.lists(st.floats(0, 1), min_size=num_layers, max_size=num_layers))))
    weights = DifficultyWeights(
        min_gap=data.draw(st.integers(1, 3)), max_gap=data.draw(st.integers(3, 6)),
        max_consecutive=data.draw(st.integers(1, 3)),
    )  # fmt: skip
    allowed = [c for c in itertools.combinations(range(num_layers), count) if longest_row(c) <= weights.max_consecutive]
    if not allowed:
        with pytest.raises(UserError, match="in a row"):
            spaced_layers(scores, count, num_layers=num_layers, weights=weights)
        return
    chosen = spaced_layers(scores, count, num_layers=num_layers, weights=weights)
    assert chosen in allowed
    best = max(value_of(c, scores, num_layers, weights) for c in allowed)
    assert value_of(chosen, scores, num_layers, weights) == pytest.approx(best, abs=1e-9)


def test_ties_go_to_the_lower_layers():
    alike = dict.fromkeys(range(6), 0.5)
    flat = DifficultyWeights(spread=0.0)
    assert spaced_layers(alike, 2, num_layers=6, weights=flat) == (0, 1)
    assert spaced_layers(alike, 2, num_layers=6, weights=DifficultyWeights(spread=0.0, max_consecutive=1)) == (0, 2)


def test_sixty_four_layers_are_solved_at_once():
    rng = np.random.default_rng(0)
    scores = dict(enumerate(rng.random(64).tolist()))
    chosen = spaced_layers(scores, 12, num_layers=64)
    assert len(chosen) == 12
    assert longest_row(chosen) <= 2
    assert max(b - a for a, b in itertools.pairwise(chosen)) <= 8


def score(recall, kl=1.0):
    return LayerScore(recall=recall, accuracy=0.0, kl=kl)


def scripted(value, asked=None):
    """value: set of layers → recall. asked: receives every set."""

    def ask(sets):
        if asked is not None:
            asked.extend(sets)
        return {layers: score(value(set(layers))) for layers in sets}

    return ask


def greedy(value, count, num_layers):
    return search_layers(scripted(value), count, range(num_layers))


def test_layers_that_complement_each_other_are_chosen():
    """1 and 2 give the same recall, 3 a smaller one of its own: the two best alone are not the best two."""

    def value(layers):
        return -5.0 + 2.0 * bool(layers & {1, 2}) + 1.5 * (3 in layers)

    chosen, rounds = greedy(value, 2, 5)
    assert chosen == (1, 3)
    assert [found.chosen for found in rounds] == [(1,), (3,)]
    assert rounds[0].values[1,] == rounds[0].values[2,] > rounds[0].values[3,]
    assert rounds[1].before.recall == -3.0
    assert set(rounds[1].scores) == {(0,), (2,), (3,), (4,)}
    # Alone, 1 and 2 are the best; pairs see that they restore the same.
    assert search_layers(scripted(value), 2, range(5), search="one_at_a_time")[0] == (1, 2)
    assert search_layers(scripted(value), 2, range(5), search="pairs", candidates=4)[0] == (1, 3)


def test_layers_that_only_help_jointly_are_found_by_pairs_alone():
    """1 and 4 restore recall together and nothing alone; 0 and 3 a little each."""

    def value(layers):
        return -9.0 + 0.5 * (0 in layers) + 0.5 * (3 in layers) + 4.0 * ({1, 4} <= layers)

    ask = scripted(value)
    assert search_layers(ask, 2, range(6), search="one_at_a_time")[0] == (0, 3)
    assert search_layers(ask, 2, range(6))[0] == (0, 3)
    chosen, (alone, together) = search_layers(ask, 2, range(6), search="pairs", candidates=6)
    assert chosen == together.chosen == (1, 4)
    assert alone.chosen == ()
    assert (alone.values[1,], together.values[1, 4], len(together.scores)) == (0.0, 4.0, 15)
    assert search_layers(ask, 3, range(6), search="pairs", candidates=6)[0] == (0, 1, 4)
    # Among too few candidates they are not measured together.
    assert search_layers(ask, 2, range(6), search="pairs", candidates=2)[0] == (0, 3)
    with pytest.raises(UserError, match="too few to choose 3 layers"):
        search_layers(ask, 3, range(6), search="pairs", candidates=2)


def test_later_rounds_measure_only_the_best_candidates():
    asked = []

    def value(layers):
        return -9.0 + sum(layers)

    chosen, rounds = search_layers(scripted(value, asked), 3, range(6), candidates=2)
    assert chosen == (3, 4, 5)
    assert [sorted(found.scores) for found in rounds] == [[(i,) for i in range(6)], [(3,), (4,)], [(2,), (3,)]]
    assert [found.kept for found in rounds] == [(), (5,), (4, 5)]
    assert set(asked[-2:]) == {(2, 4, 5), (3, 4, 5)}


def test_ties_of_recall_go_to_the_lower_layer():
    assert greedy(lambda layers: 0.0, 2, 4)[0] == (0, 1)


def test_recall_is_weighed_against_the_kl_that_is_left():
    before = score(-4.0, kl=2.0)
    assert recall_per_kl(before, score(-2.0, kl=1.0)) == 2.0
    assert recall_per_kl(before, score(-2.0, kl=1.0)) > recall_per_kl(before, score(-2.0, kl=1.5))
    assert recall_per_kl(before, score(-5.0, kl=1.0)) > recall_per_kl(before, score(-5.0, kl=1.5))
    assert recall_per_kl(before, score(-2.0, kl=0.0)) > 0
    assert recall_per_kl(before, score(math.nan)) == -math.inf


def test_a_broken_candidate_is_never_chosen():
    def ask(sets):
        return {s: score(math.nan if 0 in s else -3.0 if not s else -4.0 + sum(s) / 10) for s in sets}

    assert search_layers(ask, 1, range(3))[0] == (2,)
    assert search_layers(ask, 2, range(3), search="pairs", candidates=3)[0] == (1, 2)
