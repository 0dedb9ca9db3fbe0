"""The watch of a training job under injected faults: what it finds and does, and that a restart changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from radlads.model.student.load import load_student
from radlads.tasks.contracts.events import Event, events_of
from radlads.tasks.contracts.recipe.loss_terms import CeSpikes
from radlads.tasks.contracts.recipe.recipe import Phase, Rate, Schedule, load_recipe, parse_recipe
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.training_checks import check_training
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine

QUICK = {"window": 4, "patience": 1}
OFF = {name: {"policy": "off"} for name in ("loss_spike", "gradient_explosion", "plateau", "throughput")}
SETTINGS = {
    "mixer_rate": Rate(start=3e-3, final=3e-3),
    "rest_rate": Rate(start=1e-3, final=1e-3),
    "schedule": Schedule(kind="constant", warmup_steps=0),
    "tokens": 14 * 4 * 32,
    "checkpoint_every": 3,
}


def faulty(monkeypatch: pytest.MonkeyPatch, *steps: int, number: str = "loss", factor: float = 50.0, times: int = 1):
    """Multiply what the engine measures in these steps, the first `times` times that each is taken."""
    step, taken = Engine.step, dict.fromkeys(steps, 0)

    def stepping(self, batches, rates, index, *, stop):
        result = step(self, batches, rates, index, stop=stop)
        if taken.get(index, times) >= times:
            return result
        taken[index] += 1
        if number == "loss":
            return replace(result, metrics=result.metrics | {"loss": result.metrics["loss"] * factor})
        return replace(result, grad_norm=result.grad_norm * factor)

    monkeypatch.setattr(Engine, "step", stepping)


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1):
    """Make the loss of a step, and with it its whole gradient, NaN: the first `times` times that it is taken."""
    step, taken = Engine.step, []

    def stepping(self, batches, rates, index, *, stop):
        if index != at or len(taken) >= times:
            return step(self, batches, rates, index, stop=stop)
        forward = type(self.objective).forward
        taken.append(index)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.objective), "forward", lambda one, batch: (forward(one, batch)[0] * math.nan, {}))
            return step(self, batches, rates, index, stop=stop)

    monkeypatch.setattr(Engine, "step", stepping)


def dying(monkeypatch: pytest.MonkeyPatch, at: int):
    """End the job when step `at` begins."""
    step = Engine.step

    def stepping(self, batches, rates, index, *, stop):
        if index == at:
            raise RuntimeError("on purpose")
        return step(self, batches, rates, index, stop=stop)

    monkeypatch.setattr(Engine, "step", stepping)


def dying_after_note(monkeypatch: pytest.MonkeyPatch, at: int | None):
    """End the job once an event is on record: when step `at` begins, or, None, before anything else is done."""
    note = train.Watchdog._note

    def noting(self, event):
        note(self, event)
        if at is None:
            raise RuntimeError("on purpose")
        dying(monkeypatch, at)

    monkeypatch.setattr(train.Watchdog, "_note", noting)


def rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.scratch / "metrics.jsonl").read_text().splitlines()]


def events(job: Job) -> list[Event]:
    return events_of(rows(job))


def steps_of(job: Job) -> list[dict[str, Any]]:
    """The rows of steps without what a clock or a machine says."""
    clock = ("time", "seconds", "tokens_per_second", "memory_bytes")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(job) if "loss" in row]


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_student(job.output / "model").state_dict()


def committed(job: Job) -> list[int]:
    keys = job.store.list(f"{job.output_prefix}/checkpoints")
    return sorted(int(key.split("/")[-2][5:]) for key in keys if key.endswith("/manifest.json"))


def rolling(detector: str, **rollback: Any) -> dict[str, Any]:
    settings = QUICK if detector == "loss_spike" else {}
    return OFF | {detector: {"policy": "rollback", **settings}, "rollback": {"every": 3} | rollback}


def test_a_spike_is_reported_once_and_changes_nothing(training, monkeypatch):
    plain = training.job("finetune", "watch-plain", watch=OFF, **SETTINGS)
    assert execute(train.main, plain) == "done", training.ending(plain)
    faulty(monkeypatch, 9, 10)
    job = training.job("finetune", "watch-report", watch={"loss_spike": QUICK}, **SETTINGS)
    assert job.spec.digest == plain.spec.digest
    assert execute(train.main, job) == "done", training.ending(job)
    (event,) = events(job)
    assert (event.kind, event.step, event.first, event.action, event.to) == ("loss_spike", 9, 9, "report", None)
    before = [row["loss"] for row in steps_of(job)][4:8]
    assert event.median == pytest.approx(sorted(before)[1] / 2 + sorted(before)[2] / 2)
    assert event.value == steps_of(job)[8]["loss"] > event.threshold > event.median
    theirs = weights(plain)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(job).items())
    report = json.loads((job.output / "train.json").read_text())
    manifest = job.store.read_manifest(job.output_prefix)
    assert report["events"] == manifest.metrics["events"] == [event.model_dump(mode="json")]
    assert json.loads((job.scratch / "progress.json").read_text())["events"] == [f"{event.finding}; reported"]


@pytest.mark.parametrize("number", ["loss", "grad_norm"])
def test_stop_saves_says_what_to_do_and_goes_on_once_the_policy_is_changed(training, monkeypatch, number):
    kind = {"loss": "loss_spike", "grad_norm": "gradient_explosion"}[number]
    stopping, reporting = ({kind: {"policy": policy, **QUICK}} for policy in ("stop", "report"))
    faulty(monkeypatch, 8, number=number, times=9)
    whole = training.job("finetune", f"watch-{number}-on", watch=reporting, **SETTINGS)
    assert execute(train.main, whole) == "done", training.ending(whole)
    job = training.job("finetune", f"watch-{number}", watch=stopping, **SETTINGS)
    for _ in range(2):  # a second start with the same settings trains nothing
        assert execute(train.main, Job(spec=job.spec)) == "watch"
        assert f"set watch.{kind}.policy to report" in training.ending(job)["message"]
        assert committed(job)[-1] == 8
        assert len(steps_of(job)) == 8
        assert [event.action for event in events(job)] == ["stop"]
    changed = training.job("finetune", f"watch-{number}", watch=reporting, **SETTINGS)
    assert changed.spec.digest == job.spec.digest
    assert execute(train.main, changed) == "done", training.ending(changed)
    assert steps_of(changed) == steps_of(whole)
    assert [event.action for event in events(changed)] == ["stop", "report"]


def test_slow_steps_stop_the_job_after_the_next_one(training, monkeypatch):
    numbers = train._numbers

    def slow(section, step, *rest):
        return numbers(section, replace(step, seconds=9.0 if 8 < step.number < 13 else 1.0), *rest)

    monkeypatch.setattr(train, "_numbers", slow)
    watch = OFF | {"throughput": {"policy": "stop", "window": 4}}
    job = training.job("finetune", "watch-slow", watch=watch, **SETTINGS)
    assert execute(train.main, job) == "watch"
    assert "step 11: throughput: since step 8, tokens_per_second" in training.ending(job)["message"]
    assert committed(job)[-1] == 12
    (event,) = events(job)
    assert (event.step, event.value, event.median) == (11, pytest.approx(128 / 9), 128)
    assert execute(train.main, Job(spec=job.spec)) == "done", training.ending(job)  # on a machine that is fast again
    assert events(job) == [event]
    short = training.job("finetune", "watch-slow-end", watch=watch, **SETTINGS | {"tokens": 11 * 128})
    assert execute(train.main, short) == "done", training.ending(short)
    assert events(short) == []  # nothing was stopped: there was no next step


# Rollbacks. Steps 1 to 6 stay; the checkpoint of step 9 is from within the evidence of step 10, so 6 is the good one.

SPIKES = CeSpikes(every=2, weight=0.1)
FAULT = {"loss_spike": faulty, "nonfinite": poisoned}
ROLLBACK = {"rate_factor": 0.25, "ce_spikes": {"every": 3, "weight": 0.5}}


def rolled_job(training, name: str, fault: str, **resources: Any) -> Job:
    return training.job("distill", f"{name}-{fault}", watch=rolling(fault, **ROLLBACK), resources=resources, **SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(training) -> Job:
    job = training.job("distill", "watch-undisturbed", watch=OFF, **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    return job


@pytest.fixture(scope="module", params=FAULT)
def rolled(request, training) -> tuple[str, Job]:
    """A fault, and a finished job that was rolled back for it."""
    job = rolled_job(training, "rolled", request.param)
    with pytest.MonkeyPatch.context() as patch:
        FAULT[request.param](patch, 10)
        assert execute(train.main, job) == "done", training.ending(job)
    return request.param, job


def test_a_rollback_trains_on_from_a_good_checkpoint_in_another_way(rolled, undisturbed):
    fault, job = rolled
    (event,) = events(job)
    assert (event.kind, event.step, event.to, event.action) == (fault, 10, 6, "rollback")
    ours, theirs = steps_of(job), steps_of(undisturbed)
    assert [row["step"] for row in ours] == list(range(1, 15))
    assert ours[:6] == theirs[:6]
    assert [row["lr/mixer"] for row in ours] == [3e-3] * 6 + [0.25 * 3e-3] * 8
    assert [row["step"] for row in ours if "ce_spike" in row] == [9, 12]
    assert all(abs(a["loss"] - b["loss"]) > 1e-4 for a, b in zip(ours[6:], theirs[6:], strict=True))
    manifest = job.store.read_manifest(job.output_prefix)
    assert manifest.metrics["rollbacks"] == 1
    last_seconds = sum(row["seconds"] for row in rows(job) if "loss" in row)
    assert manifest.metrics["seconds"] == pytest.approx(event.seconds + last_seconds)
    assert event.seconds > 0


def test_without_reshuffle_the_same_rows_come_again(training, undisturbed, monkeypatch):
    faulty(monkeypatch, 10)
    watch = rolling("loss_spike", reshuffle=False, rate_factor=0.5)
    job = training.job("distill", "same-rows", watch=watch, **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    assert [event.to for event in events(job)] == [6]
    ours, theirs = ([row["loss"] for row in steps_of(one)] for one in (job, undisturbed))
    assert ours[:7] == theirs[:7]
    assert ours[7] != theirs[7]


def test_a_step_with_a_ce_spike_does_not_prove_the_checkpoint_before_it(training, monkeypatch):
    """Every second step has one. Step 11 is bad and 10 was not judged, so 9 may be bad; 8 is known to be good."""
    faulty(monkeypatch, 11)
    job = training.job("distill", "unproven", watch=rolling("loss_spike"), ce_spikes=SPIKES, **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    assert [(event.step, event.first, event.to) for event in events(job)] == [(11, 11, 6)]


PHASES = (Phase(tokens=4 * 128), Phase(tokens=4 * 96, context=48, batch=2, micro_batch=1, fresh_optimizer=True))
CASES = {
    "zero-0": ("finetune", {"zero_stage": 0}, {}),
    "zero-2 in bf16": ("finetune", {"zero_stage": 2}, {"precision": "bf16"}),
    "offloaded": ("finetune", {"offload_optimizer": True}, {}),
    "into an earlier phase": ("distill", {}, {"phases": PHASES, "tokens": 4 * 128 + 4 * 96}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_leaves_nothing_behind(training, monkeypatch, case):
    """Whatever holds the gradients: the steps after the rollback are those of a process that began from there."""
    stage, resources, settings = CASES[case]
    settings = SETTINGS | {"tokens": 8 * 128} | settings
    jobs = [
        training.job(stage, f"{name} {case}", watch=rolling("nonfinite"), resources=resources, **settings)
        for name in ("at once", "later")
    ]
    poisoned(monkeypatch, 6)
    assert execute(train.main, jobs[0]) == "done", training.ending(jobs[0])
    poisoned(monkeypatch, 6)
    with monkeypatch.context() as patch:
        dying_after_note(patch, None)
        assert execute(train.main, jobs[1]) == "crash"
    assert execute(train.main, Job(spec=jobs[1].spec)) == "done", training.ending(jobs[1])
    assert [[event.to for event in events(job)] for job in jobs] == [[3], [3]]
    assert steps_of(jobs[0]) == steps_of(jobs[1])
    ours, theirs = map(weights, jobs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rolled", ["loss_spike"], indirect=True)
@pytest.mark.parametrize("die_at", [None, 7, 12])
def test_killed_after_a_rollback_it_goes_on_as_if_it_had_not_been(training, rolled, monkeypatch, die_at):
    """None: it dies when the rollback is on record and nothing is done yet."""
    fault, whole = rolled
    job = rolled_job(training, f"killed-{die_at}", fault)
    with monkeypatch.context() as patch:
        FAULT[fault](patch, 10)
        dying_after_note(patch, die_at)
        assert execute(train.main, job) == "crash"
    assert committed(job) == ([6] if die_at == 7 else [6, 9])
    again = Job(spec=job.spec)
    assert execute(train.main, again) == "done", training.ending(again)
    assert steps_of(again) == steps_of(whole)
    assert [event.to for event in events(again)] == [6]
    theirs = weights(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(again).items())


def test_a_plateau_goes_back_to_before_it_began(training, monkeypatch):
    step = Engine.step

    def stepping(self, batches, rates, index, *, stop):
        result = step(self, batches, rates, index, stop=stop)
        loss = max(5.0, 10.0 - index) if rates["mixer"] == 3e-3 else 4.0 - 0.1 * index
        return replace(result, metrics=result.metrics | {"loss": loss})

    monkeypatch.setattr(Engine, "step", stepping)
    watch = rolling("plateau") | {"plateau": {"policy": "rollback", "window": 8, "improvement": 0.01}}
    job = training.job("finetune", "flat", watch=watch, **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    (event,) = events(job)
    assert (event.kind, event.step, event.first, event.to) == ("plateau", 11, 4, 0)
    assert [row["lr/mixer"] for row in steps_of(job)] == [1.5e-3] * 14


@pytest.mark.parametrize("rolled", ["loss_spike"], indirect=True)
def test_where_it_goes_back_to_depends_on_no_other_checkpoint(training, rolled, monkeypatch):
    """Asked to stop after step 7 it saves step 8, which would be good; and checkpoints may come at other steps."""
    fault, whole = rolled
    watch = rolling(fault, **ROLLBACK)
    job = training.job("distill", "asked", watch=watch, **SETTINGS | {"checkpoint_every": 2, "keep_checkpoints": 1})
    assert job.spec.digest == whole.spec.digest
    FAULT[fault](monkeypatch, 10)
    step = Engine.step

    def stepping(self, batches, rates, index, *, stop):
        return step(self, batches, rates, index, stop=stop or index == 8)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        assert execute(train.main, job) == "preempted"
    assert committed(job) == [3, 6, 8]
    again = Job(spec=job.spec)
    assert execute(train.main, again) == "done", training.ending(again)
    assert steps_of(again) == steps_of(whole)
    assert [event.to for event in events(again)] == [6]


def test_after_the_last_rollback_it_stops_and_goes_on_once_more_are_allowed(training, monkeypatch):
    watch = rolling("loss_spike", rate_factor=0.5)
    faulty(monkeypatch, 10, times=3)
    job = training.job("distill", "exhausted", watch=watch, **SETTINGS)
    for _ in range(2):
        assert execute(train.main, Job(spec=job.spec)) == "watch"
        message = training.ending(job)["message"]
        assert "rolled back 2 times already (watch.rollback.max_rollbacks); step 10 is saved; raise" in message
        assert [(event.action, event.to) for event in events(job)] == [("rollback", 6)] * 2 + [("stop", None)]
    assert job.store.read_manifest(job.output_prefix) is None
    watch["rollback"] |= {"max_rollbacks": 3}
    more = training.job("distill", "exhausted", watch=watch, **SETTINGS)
    assert more.spec.digest == job.spec.digest
    assert execute(train.main, more) == "done", training.ending(more)
    assert [event.to for event in events(more)] == [6, 6, None, 6]
    assert [row["lr/mixer"] for row in steps_of(more)] == [3e-3] * 6 + [3e-3 / 8] * 8


def test_a_fault_right_after_a_rollback_goes_back_to_the_same_place(training, monkeypatch):
    """And one before any checkpoint is good stops the job."""
    faulty(monkeypatch, 10)
    spiked = []
    step = Engine.step

    def stepping(self, batches, rates, index, *, stop):
        result = step(self, batches, rates, index, stop=stop)
        spiked.append(index)
        again = index == 7 and spiked.count(7) == 2
        return replace(result, metrics=result.metrics | {"loss": 1e3}) if again else result

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        watch = rolling("loss_spike") | {"nonfinite": {"policy": "rollback"}}
        job = training.job("finetune", "again", watch=watch, **SETTINGS)
        assert execute(train.main, job) == "done", training.ending(job)
    assert [(event.step, event.to) for event in events(job)] == [(10, 6), (7, 6)]
    poisoned(monkeypatch, 1)
    job = training.job("finetune", "at-once", watch=watch, seed=3, **SETTINGS)
    assert execute(train.main, job) == "watch"
    assert "no checkpoint from before it is left; lower the learning rate" in training.ending(job)["message"]


def test_a_number_that_is_still_not_finite_after_the_last_rollback_names_the_limit(training, monkeypatch):
    poisoned(monkeypatch, 5, times=2)
    job = training.job("finetune", "still-nan", watch=rolling("nonfinite", max_rollbacks=1), **SETTINGS)
    assert execute(train.main, job) == "watch"
    assert "rolled back 1 times already (watch.rollback.max_rollbacks); lower" in training.ending(job)["message"]
    assert [(event.action, event.to) for event in events(job)] == [("rollback", 3), ("stop", None)]


RANKS = """
import sys
from dataclasses import replace
import deepspeed
from radlads.tasks.jobs.common import run_job
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine

step, spoilt = Engine.step, []

def stepping(self, batches, rates, index, *, stop):
    result = step(self, batches, rates, index, stop=stop)
    if index == 10 and not spoilt:
        spoilt.append(index)
        return replace(result, metrics=result.metrics | {"loss": 50 * result.metrics["loss"]})
    return result

Engine.step = stepping
run_job(train.main, cooperative=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rolled", ["loss_spike"], indirect=True)
def test_two_ranks_decide_as_one(training, rolled, run_ranks):
    fault, alone = rolled
    job = training.job(
        "distill",
        "two-ranks",
        watch=rolling(fault, **ROLLBACK),
        resources={"processes": 2, "zero_stage": 2},
        **SETTINGS,
    )
    run_ranks(RANKS, job, 2)
    assert [(event.step, event.to) for event in events(job)] == [(10, 6)]
    ours, theirs = ([row["loss"] for row in steps_of(one)] for one in (job, alone))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("every", "warned"), [(15, True), (14, False)])
def test_a_plan_warns_of_rollbacks_that_can_only_begin_anew(every, warned):
    raw = load_recipe("smoke").model_dump(mode="json")
    raw["align"] |= {"tokens": 15 * 4 * 32, "context": 32, "batch": 4, "micro_batch": 4}
    raw["align"]["watch"] = rolling("nonfinite", every=every)
    findings = Findings()
    check_training(parse_recipe(raw), None, 1, findings)
    said = f"align: a rollback can only go back to the beginning, because watch.rollback.every ({every})"
    assert any(line.startswith(said) for line in findings.warnings) == warned


@pytest.mark.parametrize(
    ("detector", "asked", "steps"),
    [
        ("loss_spike", {"policy": "rollback", "window": 13, "patience": 3}, 16),
        ("gradient_explosion", {"policy": "stop", "window": 15}, 16),
        ("plateau", {"policy": "report", "window": 16}, 16),
        ("throughput", {"policy": "stop", "window": 8}, 16),
        ("loss_spike", {"policy": "rollback", "window": 12}, None),
        ("throughput", {"policy": "report", "window": 32}, None),
    ],
)
def test_a_plan_warns_of_detectors_that_cannot_find_anything(detector, asked, steps):
    """Asked for, and blind until its stage is over; what a default reports is not warned of."""
    raw = load_recipe("smoke").model_dump(mode="json")
    raw["align"] |= {"tokens": 15 * 4 * 32, "context": 32, "batch": 4, "micro_batch": 4}
    raw["align"]["watch"] = {detector: asked}
    findings = Findings()
    check_training(parse_recipe(raw), None, 1, findings)
    said = f"align.watch.{detector} finds nothing: it needs {steps} steps of a phase, and the longest has 15; "
    found = [line for line in findings.warnings if "finds nothing" in line]
    assert [line.startswith(said) and line.endswith("a smaller window") for line in found] == [True] * bool(steps)
