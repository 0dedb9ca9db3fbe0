"""The optimizer in host memory: the same training, resumable bit for bit, on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest

from radlads.tasks.contracts.recipe.recipe import Rate
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine

SETTINGS = {
    "mixer_rate": Rate(start=3e-3, final=1e-3),
    "rest_rate": Rate(start=1e-3, final=1e-4),
    "checkpoint_every": 4,
    "tokens": 12 * 128,
}
OFFLOADED = {"offload_optimizer": True}


@pytest.fixture(scope="module")
def whole(training) -> list[tuple[int, float]]:
    job = training.job("distill", "offloaded", resources=OFFLOADED, **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    return training.curve(job)


def test_it_trains_as_the_device_does(training, whole):
    job = training.job("distill", "on-device", resources={"zero_stage": 2}, **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    assert [loss for _, loss in training.curve(job)] == pytest.approx([loss for _, loss in whole], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_crashed_goes_on_bit_for_bit(training, monkeypatch, precision):
    settings = SETTINGS | {"precision": precision}
    uncut = training.job("distill", f"uncut-{precision}", resources=OFFLOADED, **settings)
    assert execute(train.main, uncut) == "done", training.ending(uncut)
    step = Engine.step

    def crash(self: Engine, batches: Any, rates: Any, number: int, **options: Any) -> Any:
        if number == 7:
            raise RuntimeError("cut")
        return step(self, batches, rates, number, **options)

    job = training.job("distill", f"cut-{precision}", resources=OFFLOADED, **settings)
    monkeypatch.setattr(Engine, "step", crash)
    assert execute(train.main, job) == "crash"
    monkeypatch.setattr(Engine, "step", step)
    assert execute(train.main, Job(spec=job.spec)) == "done", training.ending(job)
    assert training.curve(job) == training.curve(uncut)


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one(training, run_ranks, whole):
    job = training.job("distill", "offloaded-twice", resources=OFFLOADED, **SETTINGS)
    run_ranks("radlads.tasks.jobs.train.train", job, 2)
    assert [loss for _, loss in training.curve(job)] == pytest.approx([loss for _, loss in whole], rel=1e-4)
