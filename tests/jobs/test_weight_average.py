"""The average of what trains: its value with every engine, in checkpoints, and that it is what is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from radlads.model.weights.weight_files import open_weight_files
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Distill, Rate
from radlads.tasks.jobs.checkpoints.state_slices import AVERAGE, KINDS
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.memory import training_memory
from radlads.tasks.jobs.plan.training_checks import plan_checkpoint
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine

from .test_engine import Toy, batches, make_engine, masters
from .test_memory import config_of, count_networks, recipe_of

RATES = {"mixer_rate": Rate(start=3e-3, final=1e-3), "rest_rate": Rate(start=1e-3, final=1e-4)}
OPTIONS = {"tokens": 8 * 128, "average": {"decay": 0.6}, **RATES}
TRAIN = "radlads.tasks.jobs.train.train"


def exported(job: Job) -> dict[str, torch.Tensor]:
    files = open_weight_files(str(Path(job.spec.output_uri) / "model"))
    return {name: files.read(name) for name in files.names()}


def last_row(job: Job) -> dict[str, float]:
    rows = [json.loads(line) for line in (job.scratch / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if "heldout/loss" in row)


def done(job: Job, training: Any) -> Job:
    assert execute(train.main, job) == "done", training.ending(job)
    return job


@pytest.mark.parametrize("zero_stage", [0, 1, 2, "offload", "replicated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_average_of_the_masters(zero_stage: Any, dtype: torch.dtype) -> None:
    if zero_stage == 0 and dtype == torch.bfloat16:
        pytest.skip("bf16 has masters from ZeRO-1 on")
    engine = make_engine(Toy(), zero_stage, dtype)
    engine.keep_average(0.5)
    wanted = {name: master.double().clone() for name, master in masters(engine).items()}
    for step in range(1, 9):
        engine.step(batches(step), {"mixer": 0.0, "rest": 1e-2}, step, stop=False)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, master in masters(engine).items():
            wanted[name] = decay * wanted[name] + (1 - decay) * master.double()
    held = {one.name: one for one in engine.held_state()}
    for name, value in wanted.items():
        assert held[name].kinds == (*KINDS, AVERAGE)
        found = held[name].tensors[AVERAGE]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double().view_as(value), value, rtol=1e-6, atol=1e-7)
    engine.use_average()
    for name, parameter in engine.parameters.items():
        torch.testing.assert_close(parameter.detach(), held[name].tensors[AVERAGE].view_as(parameter).to(dtype))


def test_without_one_nothing_is_kept() -> None:
    assert all(one.kinds == KINDS for one in make_engine(Toy(), 1).held_state())


@pytest.mark.parametrize("resources", [{"zero_stage": 1}, {"zero_stage": 3}, {"offload_optimizer": True}])
def test_a_killed_run_resumes_exactly_and_exports_the_average(
    training: Any, monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any]
) -> None:
    name = "-".join(map(str, resources.values()))
    whole = done(training.job("distill", f"averaged-{name}", resources=resources, **OPTIONS), training)
    plain = training.job("distill", f"last-{name}", resources=resources, **{**OPTIONS, "average": None})
    done(plain, training)
    assert training.curve(whole) == training.curve(plain), "the average does not touch what trains"
    ours, theirs = last_row(whole), last_row(plain)
    assert ours["heldout_unaveraged/loss"] == pytest.approx(theirs["heldout/loss"], rel=1e-6)
    assert ours["heldout/loss"] != pytest.approx(theirs["heldout/loss"], rel=1e-4)

    cut = training.job("distill", f"averaged-cut-{name}", resources=resources, checkpoint_every=3, **OPTIONS)
    step = Engine.step

    def crash(self: Engine, batches: Any, rates: Any, number: int, **more: Any) -> Any:
        if number == 5:
            raise RuntimeError("cut")
        return step(self, batches, rates, number, **more)

    monkeypatch.setattr(Engine, "step", crash)
    assert execute(train.main, cut) == "crash"
    monkeypatch.setattr(Engine, "step", step)
    again = done(Job(spec=cut.spec), training)
    assert training.curve(again) == training.curve(whole)
    assert last_row(again)["heldout/loss"] == ours["heldout/loss"]
    resumed, uncut, unaveraged = exported(again), exported(whole), exported(plain)
    assert all(torch.equal(tensor, uncut[key]) for key, tensor in resumed.items())
    assert not all(torch.equal(tensor, unaveraged[key]) for key, tensor in resumed.items())


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_two_ranks_average_as_one(training: Any, run_ranks: Callable[..., None], zero_stage: int) -> None:
    options = {**OPTIONS, "micro_batch": 1, "checkpoint_every": 3}
    one = done(training.job("distill", f"averaged-one-{zero_stage}", resources={"zero_stage": 1}, **options), training)
    resources = {"processes": 2, "zero_stage": zero_stage}
    two = training.job("distill", f"averaged-two-{zero_stage}", resources=resources, **options)
    run_ranks(TRAIN, two, 2)
    ours, theirs = exported(two), exported(one)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    assert last_row(two)["heldout/loss"] == pytest.approx(last_row(one)["heldout/loss"], rel=1e-5)


def test_the_plan_counts_it() -> None:
    networks = count_networks(recipe_of(), config_of())
    plain = Distill(tokens=9999, context=64, batch=8)
    averaged = Distill(tokens=9999, context=64, batch=8, average={})
    trained = networks.student_parameters
    for more in ({}, {"processes": 4}, {"offload_optimizer": True}):
        resources = JobResources(**{"device": "cuda", "processes": 1, "threads": 1, "gpu_memory_gib": 80, **more})
        before, after = (training_memory("distill", one, networks, resources) for one in (plain, averaged))
        place = "host" if resources.offload_optimizer else "optimizer"
        assert after[place] - before[place] == pytest.approx(4 * trained / resources.processes, abs=4)
    sizes = [
        plan_checkpoint("distill", one, trained, resources, Findings())["bytes"] for one in (plain, averaged)
    ]  # fmt: skip
    assert sizes == [12 * trained, 16 * trained]


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_decays_that_average_nothing_are_told(decay: float) -> None:
    with pytest.raises(ValueError, match=r"average\.decay"):
        Distill(tokens=9999, context=64, batch=8, average={"decay": decay})
