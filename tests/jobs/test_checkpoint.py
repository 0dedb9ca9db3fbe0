"""Checkpoints: all of the state, the newest that verifies, and never fewer than promised."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch

from radlads.model.training.objectives import build_objective
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import LeaseRef
from radlads.tasks.contracts.locks.holder import this_process
from radlads.tasks.contracts.locks.lease import LeaseSheet
from radlads.tasks.contracts.recipe.recipe import Rate
from radlads.tasks.jobs.checkpoints.checkpoint import Checkpoints
from radlads.tasks.jobs.checkpoints.random_state import read_random_state, seed_everything, write_random_state
from radlads.tasks.jobs.common import Job, Preempted, execute
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine

RATES = {"mixer_rate": Rate(start=3e-3, final=1e-3), "rest_rate": Rate(start=1e-3, final=1e-4)}


class StoppedError(Exception):
    """Stands in for whatever ends a process."""


def stop_after(monkeypatch, step: int, error: type[BaseException] = StoppedError) -> None:
    """End the training loop when step + 1 begins."""
    original = Engine.step

    def stepping(self, batches, rates, number, *, stop):
        if number == step + 1:
            raise error("stopped by the test")
        return original(self, batches, rates, number, stop=stop)

    monkeypatch.setattr(Engine, "step", stepping)


def steps_of(step):
    """Engine.step, and the numbers of the steps that it took."""

    def stepping(self, batches, rates, number, *, stop):
        stepping.numbers.append(number)
        return step(self, batches, rates, number, stop=stop)

    stepping.numbers = []
    return stepping


def committed(job: Job) -> list[str]:
    keys = job.store.list(f"{job.output_prefix}/checkpoints")
    return sorted(key.split("/")[-2] for key in keys if key.endswith("/manifest.json"))


@pytest.fixture(scope="module")
def whole(training) -> list[tuple[int, float]]:
    """The curve of a job that nothing interrupted."""
    job = training.job("distill", "whole", **RATES)
    assert execute(train.main, job) == "done", training.ending(job)
    return training.curve(job)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_resumed_from_a_checkpoint_the_curve_is_the_same_bit_for_bit(training, whole, zero_stage, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 14)
        job = training.job("distill", f"resumed-{zero_stage}", resources={"zero_stage": zero_stage}, **RATES)
        assert execute(train.main, job) == "crash"
    assert committed(job) == ["step-000006", "step-000012"]
    again = Job(spec=job.spec)
    assert execute(train.main, again) == "done", training.ending(job)
    curve = training.curve(job)
    assert [step for step, _ in curve] == list(range(1, 21))
    if zero_stage == 1:
        assert curve == whole
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in whole], rel=1e-5)


def test_following_the_advice_for_too_little_memory_costs_no_step(training, whole, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 14, MemoryError)
        job = training.job("distill", "advised", **RATES)
        assert execute(train.main, job) == "out-of-memory"
    advice = training.ending(job)["message"]
    assert "micro_batch" in advice
    assert "gradient_checkpointing" in advice
    advised = training.job("distill", "advised", **RATES, micro_batch=1, gradient_checkpointing=True)
    assert advised.spec.digest == job.spec.digest
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", recorded := steps_of(Engine.step))
        assert execute(train.main, advised) == "done", training.ending(advised)
    assert recorded.numbers == list(range(13, 21))
    losses = [[loss for _, loss in curve] for curve in (training.curve(advised), whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_machine_that_has_not_seen_the_job_continues_it_with_its_record(training, whole, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        job = training.job("distill", "moved", **RATES)
        execute(train.main, job)
    shutil.rmtree(job.scratch)
    again = training.job("distill", "moved", **RATES)
    assert execute(train.main, again) == "done", training.ending(again)
    assert training.curve(again) == whole


def test_a_record_of_another_history_gives_way_to_the_checkpoints(training, whole, monkeypatch):
    """This machine was asleep while another one went on from an earlier step; both have as many rows."""
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        job = training.job("distill", "asleep", **RATES)
        execute(train.main, job)
    record = job.scratch / "metrics.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    other = [row | ({"loss": 99.0, "time": 1} if row["step"] > 6 else {}) for row in rows]
    record.write_text("".join(json.dumps(row) + "\n" for row in other))
    assert execute(train.main, Job(spec=job.spec)) == "done", training.ending(job)
    assert training.curve(job) == whole


def test_a_corrupt_checkpoint_is_passed_over_and_replaced(training, whole, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 14)
        job = training.job("distill", "corrupt", **RATES)
        execute(train.main, job)
    place = training.root / "store" / job.output_prefix / "checkpoints" / "step-000012"
    (state,) = place.glob("state-*.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.chmod(0o644)
    state.write_bytes(data)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        assert execute(train.main, Job(spec=job.spec)) == "crash"
    assert [step for step, _ in training.curve(job)] == [1, 2, 3, 4, 5, 6, 7, 8]
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        assert execute(train.main, Job(spec=job.spec)) == "crash"
    assert execute(train.main, Job(spec=job.spec)) == "done"
    assert training.curve(job) == whole


def test_a_job_whose_run_was_taken_over_publishes_no_checkpoint_and_says_why(training, monkeypatch):
    """It slept; another process went on from step 6 and is at work. The next checkpoint is where it finds out."""
    plain = training.job("distill", "fenced", **RATES)
    store, key = plain.store, "runs/fenced/lease.json"
    mine = LeaseSheet(token=3, owner="mine", holder=this_process(training.root))
    far = mine.holder.model_copy(update={"host": "far", "user": "ada", "pid": 4242})
    store.put_bytes(key, mine.model_dump_json().encode())
    job = Job(spec=plain.spec.model_copy(update={"lease": LeaseRef(key=key, token=3)}))
    original = Engine.step

    def stepping(self, batches, rates, number, *, stop):
        if number == 8:
            theirs = mine.model_copy(update={"token": 4, "owner": "theirs", "holder": far})
            store.put_bytes(key, theirs.model_dump_json().encode())
        return original(self, batches, rates, number, stop=stop)

    monkeypatch.setattr(Engine, "step", stepping)
    assert execute(train.main, job) == "config"
    assert "taken over by ada@far (pid 4242)" in training.ending(job)["message"]
    assert committed(job) == ["step-000006"]
    assert job.store.read_manifest(job.output_prefix) is None


def test_a_failed_upload_fails_the_job_and_the_last_good_checkpoint_stays(training, monkeypatch):
    job = training.job("distill", "upload", **RATES)
    original = type(job.store).put_blocks

    def put_blocks(self, key, blocks):
        if "/step-000012/" in key:
            raise OSError("the disk is full")
        return original(self, key, blocks)

    monkeypatch.setattr(type(job.store), "put_blocks", put_blocks)
    assert execute(train.main, job) == "crash"
    assert "the disk is full" in training.ending(job)["message"]
    assert committed(job) == ["step-000006"]
    assert job.store.read_manifest(job.output_prefix) is None


def test_retention_keeps_what_the_recipe_says(training):
    job = training.job("distill", "retention", checkpoint_every=3, keep_checkpoints=3, **RATES)
    assert execute(train.main, job) == "done"
    assert committed(job) == ["step-000015", "step-000018", "step-000020"]
    assert job.store.get_bytes(f"{job.output_prefix}/checkpoints/latest") == b"step-000020\n"


def test_a_request_to_stop_saves_and_says_so(training, whole, monkeypatch):
    job = training.job("distill", "asked-to-stop", checkpoint_every=1000, **RATES)
    original = Engine.step

    def stepping(self, batches, rates, number, *, stop):
        job.stop_requested |= number == 4  # what the SIGTERM handler does, between two steps
        return original(self, batches, rates, number, stop=stop)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        assert execute(train.main, job) == "preempted"
    assert training.ending(job)["reason"] == "preempted"
    assert committed(job) in (["step-000004"], ["step-000005"])
    assert execute(train.main, Job(spec=job.spec)) == "done"
    assert training.curve(job) == whole


def test_a_checkpoint_of_another_recipe_is_refused(training, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7, Preempted)
        job = training.job("distill", "other", **RATES)
        execute(train.main, job)
    other = training.job("distill", "other", seed=7, **RATES)
    assert execute(train.main, other) == "config"
    assert "a checkpoint of another product" in training.ending(other)["message"]


def test_parameters_that_do_not_fit_are_refused(training):
    job = training.job("distill", "misfit", **RATES)
    job.open_process_group()
    networks = train.load_networks(job, job.typed)
    objective = build_objective(job.typed, networks.student, networks.teacher)
    section = job.typed.section
    engine = Engine(objective, section, device=job.device, dtype=job.dtype, zero_stage=1, micro_batch=2, num_micro=2)
    with Checkpoints(job, engine, seed=1, keep=2) as checkpoints:
        checkpoints.save(1)
        checkpoints.wait()
        engine.parameters.pop(next(iter(engine.parameters)))
        with pytest.raises(UserError, match="do not train the same parameters"):
            checkpoints.restore()


def test_every_generator_continues_where_it_was():
    def draw() -> tuple[float, ...]:
        return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item())

    seed_everything(5)
    draw()
    state = read_random_state()
    expected = draw(), draw()
    seed_everything(6)
    write_random_state(state)
    assert (draw(), draw()) == expected
