"""A distill job of several phases, and one with LoRA: what each step does, and that a restart changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from radlads.model.student.load import load_student
from radlads.tasks.contracts.recipe.recipe import Distill, Lora, Phase, Rate, Schedule
from radlads.tasks.jobs.common import execute
from radlads.tasks.jobs.data.batch_plan import plan_batches
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.schedule import learning_rates

PHASES = (
    Phase(tokens=4 * 4 * 32, temperature=1.5, mixer_rate=Rate(start=3e-3, final=3e-3)),
    Phase(tokens=4 * 2 * 48, context=48, batch=2, micro_batch=2, ce_weight=0.1, fresh_optimizer=True),
    Phase(
        tokens=4 * 4 * 32,
        rest_rate=Rate(start=1e-3, final=1e-4),
        schedule=Schedule(kind="exponential", warmup_steps=0),
        micro_batch=1,
    ),
)
SETTINGS = {
    "phases": PHASES,
    "tokens": sum(phase.tokens for phase in PHASES),
    "mixer_rate": Rate(start=1e-3, final=1e-3),
    "rest_rate": Rate(start=1e-3, final=1e-3),
    "schedule": Schedule(kind="constant", warmup_steps=0),
    "checkpoint_every": 4,
    "heldout_every": 4,
}


def rows(job):
    lines = (job.scratch / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def phased(training):
    job = training.job("distill", "phased", **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    return job


def test_every_phase_has_its_steps_tokens_and_rates(phased):
    seen = rows(phased)
    assert [row["phase"] for row in seen] == [1] * 4 + [2] * 4 + [3] * 4
    assert [row["tokens"] for row in seen][3::4] == [512, 896, 1408]
    assert [row["lr/mixer"] for row in seen][::4] == [3e-3, 1e-3, 1e-3]
    assert seen[8]["lr/rest"] == 1e-3
    assert seen[10]["lr/rest"] == pytest.approx(1e-3 * 0.1**0.5)
    report = json.loads((phased.output / "train.json").read_text())
    assert report["tokens"] == 1408
    assert report["steps"] == 12


@pytest.mark.parametrize("last_step", [3, 4, 6, 8])
def test_a_restart_in_any_phase_gives_the_same_curve(training, phased, monkeypatch, last_step):
    step = Engine.step

    def dies(self, batches, rates, number, *, stop):
        if number == last_step + 1:
            raise RuntimeError("on purpose")
        return step(self, batches, rates, number, stop=stop)

    monkeypatch.setattr(Engine, "step", dies)
    job = training.job("distill", f"phased-{last_step}", **SETTINGS | {"checkpoint_every": 2})
    assert execute(train.main, job) == "crash"
    monkeypatch.setattr(Engine, "step", step)
    again = training.job("distill", f"phased-{last_step}", **SETTINGS | {"checkpoint_every": 2})
    assert execute(train.main, again) == "done", training.ending(again)
    assert training.curve(again) == training.curve(phased)
    ours, theirs = (load_student(j.output / "model").state_dict() for j in (again, phased))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_optimizer_begins_as_new_only_where_it_is_said(training, monkeypatch):
    forgotten = []
    monkeypatch.setattr(Engine, "forget", lambda self: forgotten.append(self.adam_steps()))
    job = training.job("distill", "forgetful", **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    assert forgotten == [4]


def test_phases_of_one_context_go_on_in_one_order(training):
    section = Distill(**{"context": 32, "batch": 4} | SETTINGS)
    split = open_dataset(training.root / "data").split("train")
    first, second, third = plan_batches(section, split, 1)
    whole = [row for step in range(8) for row in first.rows(step)]
    assert [row for step in range(4) for row in third.rows(step)] == whole[16:]
    assert second.skip == 0
    assert third.skip == 16
    assert learning_rates(section, 11)["mixer"] == 1e-3


def test_lora_learns_and_its_product_is_plain(training):
    settings = {"lora": Lora(rank=4, scale=1.0), "mixer_rate": Rate(start=3e-3, final=3e-3)}
    job = training.job("distill", "lora", tokens=12 * 128, heldout_every=4, **settings)
    assert execute(train.main, job) == "done", training.ending(job)
    before = load_student(training.root / "student" / "model").state_dict()
    after = load_student(job.output / "model").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert {name for name in after if name.split(".")[-2] in projections} <= moved
    assert all("self_attn" in name for name in moved)
    losses = dict(json.loads((job.output / "train.json").read_text())["heldout_losses"])
    assert losses[12] < losses[4]


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_shared_states_follow_the_phases_too(training, phased, zero_stage):
    job = training.job("distill", f"phased-zero-{zero_stage}", resources={"zero_stage": zero_stage}, **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    assert [loss for _, loss in training.curve(job)] == pytest.approx(
        [loss for _, loss in training.curve(phased)], rel=1e-5
    )
