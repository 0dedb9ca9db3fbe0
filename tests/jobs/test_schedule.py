"""The four schedules at the places where they are known."""

from __future__ import annotations

import math

import pytest

from radlads.tasks.contracts.recipe.recipe import Align, Rate, Schedule
from radlads.tasks.jobs.train.schedule import learning_rate, learning_rates, warmup_steps

RATE = Rate(start=1e-3, final=1e-5)


def at(kind: str, step: int, num_steps: int = 1000, **options) -> float:
    return learning_rate(Schedule(kind=kind, warmup_steps=options.pop("warmup", 0), **options), RATE, step, num_steps)


def test_quarter_cosine_is_flat_first_and_steep_last():
    assert at("quarter_cosine", 0) == 1e-3
    assert at("quarter_cosine", 500) == pytest.approx(1e-5 + 99e-5 * math.cos(math.pi / 4))
    assert at("quarter_cosine", 1000) == pytest.approx(1e-5)
    first, last = (
        at("quarter_cosine", 0) - at("quarter_cosine", 1),
        at("quarter_cosine", 998) - at("quarter_cosine", 999),
    )
    assert last > 100 * first


def test_cosine_is_halfway_in_the_middle():
    assert at("cosine", 0) == 1e-3
    assert at("cosine", 500) == pytest.approx((1e-3 + 1e-5) / 2)
    assert at("cosine", 1000) == pytest.approx(1e-5)


def test_stable_cosine_stable_moves_only_between_its_ends():
    def rate(step: int) -> float:
        return at("stable_cosine_stable", step, begin=0.8, end=0.9)

    assert [rate(step) for step in (0, 400, 800)] == [1e-3] * 3
    assert rate(850) == pytest.approx(1e-5 + 99e-5 * math.cos(math.pi / 4))
    assert [rate(step) for step in (900, 999)] == pytest.approx([1e-5] * 2)


def test_constant_is_constant():
    assert {at("constant", step) for step in range(0, 1000, 100)} == {1e-3}


def test_warmup_is_linear_from_one_percent_and_at_most_a_tenth():
    assert at("constant", 0, warmup=50) == pytest.approx(1e-5)
    assert at("constant", 25, warmup=50) == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
    assert at("constant", 50, warmup=50) == 1e-3
    assert at("quarter_cosine", 50, warmup=50) == 1e-3
    assert warmup_steps(Schedule(warmup_steps=50), 100) == 10
    assert warmup_steps(Schedule(warmup_steps=50), 5) == 0
    assert at("constant", 0, num_steps=5, warmup=50) == 1e-3


def test_each_group_has_its_own_rate():
    section = Align(tokens=64 * 100, context=64, batch=1, mixer_rate=RATE, rest_rate=Rate(start=2e-4, final=2e-4))
    rates = learning_rates(section, 40)
    assert rates["mixer"] == learning_rate(section.schedule, RATE, 40, 100)
    assert rates["rest"] == pytest.approx(2e-4)


def test_linear_and_exponential_go_evenly():
    assert at("linear", 250) == pytest.approx(1e-3 - 99e-5 / 4)
    assert at("linear", 1000) == pytest.approx(1e-5)
    assert at("exponential", 500) == pytest.approx(1e-4)
    assert at("exponential", 1000) == pytest.approx(1e-5)
    assert at("exponential", 500, begin=0.5) == 1e-3
    still = Schedule(kind="exponential", warmup_steps=0)
    assert learning_rate(still, Rate(start=0.0, final=0.0), 5, 10) == 0
