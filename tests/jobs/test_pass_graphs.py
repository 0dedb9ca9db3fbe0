"""Passes at fixed addresses: recorded ones equal eager ones, kinds are kept apart, what cannot be recorded is told.

A stand-in for CUDA graphs records by keeping the function: what it launches must read and write the same tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Align, Finetune, Optimizer, Rate
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.process_group import join_group
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.build import records_passes, why_not_recorded
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.engines.pass_graphs import NUM_EAGER, WaitsForGpuError
from radlads.tasks.jobs.train.engines.replicated_engine import ReplicatedEngine

SECTION = Finetune(tokens=1000, context=8, batch=4, micro_batch=2, optimizer=Optimizer(clip=0.1, weight_decay=0.1))
CPU = torch.device("cpu")
JOB = {
    "tokens": 8 * 128, "checkpoint_every": 4, "heldout_every": 3, "ce_spikes": {"every": 3, "weight": 0.5},
    "mixer_rate": Rate(start=3e-3, final=1e-3), "rest_rate": Rate(start=1e-3, final=1e-4),
}  # fmt: skip
RATES = {"mixer": 0.0, "rest": 1e-2}


class Toy(torch.nn.Module):
    """An objective with a setting that changes, and labels that are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 50))
        self.weight = 1.0

    def trainable(self, name: str) -> bool:
        return True

    def fixed_settings(self) -> float:
        return self.weight

    def num_labels(self, batch: Any) -> int:
        return int(batch["loss_mask"][:, 1:].sum())

    def forward(self, batch: Any) -> Any:
        logits = self.student(batch["input_ids"][:, :-1]).float()
        labels = batch["input_ids"][:, 1:].masked_fill(~batch["loss_mask"][:, 1:], -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self.weight * loss, {"double": 2 * loss.detach()}


class StandIn:
    """Records by keeping the function; counts, and refuses to rehearse strictly if it is told to."""

    def __init__(self, waits: bool = False) -> None:
        self.waits, self.eager, self.strict, self.replays = waits, 0, 0, 0
        self.recorded: list[Callable[[], Any]] = []

    def rehearse(self, run: Callable[[], Any], *, strict: bool) -> Any:
        self.strict += strict
        if strict and self.waits:
            raise WaitsForGpuError("a read")
        self.eager += 1
        return run()

    def record(self, run: Callable[[], Any]) -> Any:
        results: dict[str, torch.Tensor] = {}

        def replay() -> None:
            self.replays += 1
            for name, value in run().items():
                results.setdefault(name, torch.zeros(())).data = value

        self.recorded.append(run)
        return results, replay


def batches(step: int, tokens: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for _ in range(2):
        ids = torch.randint(0, 50, (2, tokens), generator=generator)
        made.append({"input_ids": ids, "loss_mask": torch.rand(ids.shape, generator=generator) < 0.8})
    return made


def engine(recorders: list[StandIn] | None, dtype: torch.dtype = torch.float32, **options: Any) -> ReplicatedEngine:
    join_group(CPU, 0, 1)

    def make() -> StandIn:
        assert recorders is not None
        recorders.append(StandIn(**options))
        return recorders[-1]

    strict = options.pop("strict", False)
    return ReplicatedEngine(
        Toy(), SECTION, device=CPU, dtype=dtype, micro_batch=2, num_micro=2,
        make_recorder=None if recorders is None else make, strict=strict,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_passes_train_as_eager_ones_do(dtype: torch.dtype) -> None:
    recorders: list[StandIn] = []
    recorded, eager = engine(recorders, dtype), engine(None, dtype)
    addresses = [parameter.data_ptr() for parameter in recorded.parameters.values()]
    for step in range(6):
        for one in (recorded, eager):
            one.objective.weight = 0.5 if step == 4 else 1.0  # a spike has passes of its own
        results = [one.step(batches(step), RATES, step + 1, stop=False) for one in (recorded, eager)]
        assert results[0] == results[1]
    for one, other in zip(recorded.held_state(), eager.held_state(), strict=True):
        assert all(torch.equal(tensor, other.tensors[kind]) for kind, tensor in one.tensors.items())
    (used,) = recorders
    assert (used.eager, used.strict, used.replays) == (2 * NUM_EAGER, 2, 12 - 2 * NUM_EAGER)
    assert len(used.recorded) == 1, "of the spike's two passes none was recorded yet"
    assert addresses == [parameter.data_ptr() for parameter in recorded.parameters.values()]


def test_a_phase_begins_with_nothing_recorded() -> None:
    recorders: list[StandIn] = []
    one = engine(recorders)
    for step in range(2):
        one.step(batches(step), RATES, step + 1, stop=False)
    one.accumulate(2, 2)
    one.step(batches(2, tokens=17), RATES, 3, stop=False)
    assert [recorder.replays for recorder in recorders] == [2, 0]


def test_a_pass_that_waits_goes_on_as_it_is_or_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    recorders: list[StandIn] = []
    waiting, eager = engine(recorders, waits=True), engine(None)
    with caplog.at_level(logging.WARNING, "radlads"):
        for step in range(4):
            results = [one.step(batches(step), RATES, step + 1, stop=False) for one in (waiting, eager)]
            assert results[0] == results[1]
    assert [record.getMessage() for record in caplog.records if "not recorded" in record.getMessage()] == [
        "passes of 2×9 tokens are not recorded as a CUDA graph: they wait for the GPU (a read)"
    ]
    assert recorders[0].recorded == []
    with pytest.raises(UserError, match=r"cuda_graphs is on, but a pass .* waits for the GPU \(a read\)"):
        engine([], waits=True, strict=True).step(batches(0), RATES, 1, stop=False)


@pytest.mark.parametrize("recorded_first", [True, False])
def test_a_job_goes_on_under_another_engine(
    training: Any, monkeypatch: pytest.MonkeyPatch, recorded_first: bool, uncut: list[float]
) -> None:
    """One engine trains until step 4, the other one from its checkpoint: the curve is that of one engine."""
    job = training.job("distill", f"graphs-first-{recorded_first}", **JOB, gradient_checkpointing="selective")
    build, step = train.build_engine, Engine.step

    def replicas(job: Job, objective: Any, section: Any, **sizes: int) -> ReplicatedEngine:
        options = {"device": job.device, "dtype": job.dtype, "make_recorder": StandIn, "strict": True}
        return ReplicatedEngine(objective, section, **options, **sizes)

    def crash(self: Engine, given: Any, rates: Any, number: int, **more: Any) -> Any:
        if number == 5:
            raise RuntimeError("cut")
        return step(self, given, rates, number, **more)

    monkeypatch.setattr(Engine, "step", crash)
    monkeypatch.setattr(train, "build_engine", replicas if recorded_first else build)
    assert execute(train.main, job) == "crash"
    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(train, "build_engine", build if recorded_first else replicas)
    assert execute(train.main, Job(spec=job.spec)) == "done", training.ending(job)
    assert [loss for _, loss in training.curve(job)] == pytest.approx(uncut, rel=1e-5)


@pytest.fixture(scope="module")
def uncut(training: Any) -> list[float]:
    job = training.job("distill", "graphs-uncut", **JOB)
    assert execute(train.main, job) == "done", training.ending(job)
    return [loss for _, loss in training.curve(job)]


GPU = JobResources(device="cuda", processes=1, threads=1, cuda_graphs="on")


@pytest.mark.parametrize(
    ("section", "resources", "told"),
    [
        (SECTION, GPU, None),
        (SECTION, GPU.model_copy(update={"device": "cpu"}), "only a GPU"),
        (SECTION, GPU.model_copy(update={"zero_stage": 3}), "zero_stage: 3"),
        (SECTION, GPU.model_copy(update={"offload_optimizer": True}), "offload_optimizer"),
        (SECTION.model_copy(update={"reset_at_documents": True}), GPU, "reset_at_documents"),
        (SECTION.model_copy(update={"sequence_parallel": 2}), GPU, "sequence_parallel"),
        (
            Align(tokens=99, context=9, batch=1, loss="comprehensive", comprehensive={"revision": "svd"}),
            GPU,
            "revision svd",
        ),
    ],
)
def test_what_excludes_it(section: Any, resources: JobResources, told: str | None) -> None:
    reason = why_not_recorded(section, resources)
    assert (reason is None) == (told is None) == records_passes(section, resources, 1)
    assert told is None or told in reason


def test_who_is_small_enough() -> None:
    auto = GPU.model_copy(update={"cuda_graphs": "auto"})
    assert [records_passes(SECTION, auto, count) for count in (10**8, 10**10)] == [True, False]
    assert records_passes(SECTION, GPU, 10**10)
    assert not records_passes(SECTION, GPU.model_copy(update={"cuda_graphs": "off"}), 1)
