"""An extend job: contexts that grow, recall text among the rows, a KL in its first phase; a restart changes nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from radlads.model.student.load import load_student
from radlads.tasks.contracts.recipe.losses import Extend, ExtendPhase
from radlads.tasks.contracts.recipe.recipe import Rate, Schedule
from radlads.tasks.contracts.recipe.training import MixedRows
from radlads.tasks.jobs.common import execute
from radlads.tasks.jobs.data.batch_plan import plan_batches
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.train import train, training_models
from radlads.tasks.jobs.train.engines.engine import Engine

PHASES = (
    ExtendPhase(tokens=4 * 4 * 32, teacher_kl=0.5),
    ExtendPhase(tokens=3 * 4 * 48, context=48, rest_rate=Rate(start=1e-3, final=1e-4)),
    ExtendPhase(tokens=3 * 2 * 96, context=96, batch=2, micro_batch=1),
)
SETTINGS = {
    "phases": PHASES,
    "tokens": sum(phase.tokens for phase in PHASES),
    "recall": MixedRows(data="recall", share=0.25),
    "mixer_rate": Rate(start=1e-3, final=1e-3),
    "rest_rate": Rate(start=1e-3, final=1e-3),
    "schedule": Schedule(kind="constant", warmup_steps=0),
    "checkpoint_every": 2,
}


def rows(job):
    lines = (job.scratch / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def extended(training):
    """The finished job, and the tokens [sequences, context + 1] of each of its forward passes."""
    seen, original = [], Engine.step

    def watched(self, batches, rates, number, *, stop):
        batches = list(batches)
        seen.append((number, [batch["input_ids"] for batch in batches]))
        return original(self, batches, rates, number, stop=stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", watched)
        job = training.job("extend", "extended", **SETTINGS)
        assert execute(train.main, job) == "done", training.ending(job)
    return job, seen


def test_every_phase_has_its_context_and_its_loss(extended):
    job, seen = extended
    assert [row["phase"] for row in rows(job)] == [1] * 4 + [2] * 3 + [3] * 3
    assert ["kl" in row for row in rows(job)] == [True] * 4 + [False] * 6
    assert [row["tokens"] for row in rows(job)] == [128 * n for n in (1, 2, 3, 4)] + [
        512 + 192 * n for n in (1, 2, 3, 4, 5, 6)
    ]
    shapes = {number: [tuple(ids.shape) for ids in micro] for number, micro in seen}
    assert shapes[1] == [(2, 33)] * 2
    assert shapes[5] == [(2, 49)] * 2
    assert shapes[8] == [(1, 97)] * 2
    losses = dict(json.loads((job.output / "train.json").read_text())["heldout_losses"])
    assert losses.keys() == {10}


def test_the_share_of_recall_rows_is_what_was_asked_for(training, extended):
    """Read off the tokens themselves: rows that stand in the mixed-in dataset at a row's place."""
    _, seen = extended
    split = open_dataset(training.root / "mixed_data").split("train")
    for context, asked in ((32, 4), (48, 3), (96, 1)):
        theirs = {tuple(split.batch([row], context)["input_ids"][0].tolist()) for row in range(split.rows(context))}
        sequences = [row for _, micro in seen for ids in micro if ids.shape[1] == context + 1 for row in ids.tolist()]
        assert sum(tuple(row) in theirs for row in sequences) == asked == len(sequences) // 4


@pytest.mark.parametrize("last_step", [3, 4, 6])
def test_a_restart_in_any_phase_gives_the_same_curve_and_weights(training, extended, monkeypatch, last_step):
    """In the middle of a phase between two checkpoints, where a phase ends, and in the middle of the second."""
    step = Engine.step

    def dies(self, batches, rates, number, *, stop):
        if number == last_step + 1:
            raise RuntimeError("on purpose")
        return step(self, batches, rates, number, stop=stop)

    monkeypatch.setattr(Engine, "step", dies)
    job = training.job("extend", f"extended-{last_step}", **SETTINGS)
    assert execute(train.main, job) == "crash"
    monkeypatch.setattr(Engine, "step", step)
    again = training.job("extend", f"extended-{last_step}", **SETTINGS)
    assert execute(train.main, again) == "done", training.ending(again)
    assert training.curve(again) == training.curve(extended[0])
    ours, theirs = (load_student(j.output / "model").state_dict() for j in (again, extended[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_a_kl_no_teacher_is_loaded(training, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(training_models, "load_teacher", refuse)
    job = training.job("extend", "alone", tokens=2 * 128)
    assert execute(train.main, job) == "done", training.ending(job)
    taught = training.job("extend", "taught", tokens=2 * 128, teacher_kl=0.1)
    assert execute(train.main, taught) == "crash"
    assert "a teacher was loaded" in training.ending(taught)["message"]


def test_rows_are_mixed_in_only_where_both_sides_say_so(training):
    section = Extend(**{"context": 32, "batch": 4, "micro_batch": 2} | SETTINGS)
    data, mixed = (open_dataset(training.root / name).split("train") for name in ("data", "mixed_data"))
    with pytest.raises(ValueError, match="a section that mixes rows in needs the dataset"):
        plan_batches(section, data, 1)
    plans = plan_batches(section, data, 1, mixed=mixed)
    assert [(plan.context, plan.skip) for plan in plans] == [(32, 0), (48, 0), (96, 0)]
    drawn = np.concatenate([plans[0].rows(step) for step in range(4)])
    assert (drawn >= data.rows(32)).sum() == 4
