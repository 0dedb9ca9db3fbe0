"""The engine against a training loop in plain torch, for every ZeRO stage and precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Finetune, Optimizer
from radlads.tasks.jobs.process_group import join_group
from radlads.tasks.jobs.train.engines import deepspeed_config
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.engines.parameter_groups import optimizer_groups, select_trainable
from radlads.tasks.jobs.train.engines.replicated_engine import ReplicatedEngine

SECTION = Finetune(tokens=1000, context=8, batch=4, micro_batch=2, optimizer=Optimizer(clip=0.1, weight_decay=0.1))
CPU = torch.device("cpu")


class Toy(nn.Module):
    """An objective over a student of four parameters; with `unused`, one more that gets no gradient."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 50))
        if unused:
            self.student.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))

    def trainable(self, name):
        return True

    def num_labels(self, batch):
        return batch["input_ids"][:, 1:].numel()

    def forward(self, batch):
        logits = self.student(batch["input_ids"][:, :-1]).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        return loss, {"double": 2 * loss.detach()}


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [{"input_ids": torch.randint(0, 50, (2, 9), generator=generator)} for _ in range(2)]


def make_engine(toy: Toy, zero_stage: int | str, dtype: torch.dtype = torch.float32) -> Engine:
    """zero_stage: or "offload", or "replicated"."""
    join_group(CPU, 0, 1)
    if zero_stage == "replicated":
        return ReplicatedEngine(toy, SECTION, device=CPU, dtype=dtype, micro_batch=2, num_micro=2)
    offload = zero_stage == "offload"
    stage = 1 if offload else zero_stage
    return Engine(toy, SECTION, device=CPU, dtype=dtype, zero_stage=stage, micro_batch=2, num_micro=2, offload=offload)


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """The fp32 masters of the only rank, by name."""
    return {one.name: one.tensors["param"].view_as(engine.parameters[one.name]) for one in engine.held_state()}


def plain_training(num_steps: int) -> tuple[Toy, list[tuple[float, float]]]:
    """(loss, gradient norm) of every step of a loop in plain torch."""
    toy = Toy()
    matrices = [p for p in toy.parameters() if p.ndim > 1]
    vectors = [p for p in toy.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    seen = []
    for step in range(num_steps):
        losses = [toy(batch)[0] for batch in batches(step)]
        loss = sum(losses) / 2
        loss.backward()
        norm = nn.utils.clip_grad_norm_(toy.parameters(), 0.1)
        adam.step()
        adam.zero_grad()
        seen.append((loss.item(), norm.item()))
    return toy, seen


@pytest.mark.parametrize("zero_stage", [0, 1, 2, "offload", "replicated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_trains_as_plain_torch_does(zero_stage, dtype):
    plain, expected = plain_training(6)
    engine = make_engine(Toy(), zero_stage, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for step, (loss, norm) in enumerate(expected):
        seen = engine.step(batches(step), {"mixer": 0.0, "rest": 1e-2}, step, stop=step == 3)
        assert seen.metrics["loss"] == pytest.approx(loss, rel=tolerance)
        assert seen.metrics["double"] == pytest.approx(2 * loss, rel=tolerance)
        assert seen.grad_norm == pytest.approx(norm, rel=4 * tolerance)
        assert seen.stop == (step == 3)
    assert engine.adam_steps() == 6
    for name, wanted in plain.student.named_parameters():
        master = masters(engine)[name]
        assert master.dtype == torch.float32
        # In bf16 the weights themselves (up to 3) were rounded before the first step.
        assert torch.allclose(master, wanted, atol=2e-6 if dtype == torch.float32 else 3e-2), name


def test_the_factor_of_the_gradient_is_where_the_optimizer_reads_it():
    """On another device torch copies it without waiting, and AdamW on the CPU divides by what was there before."""
    engine = make_engine(Toy(), "offload")
    engine.device = torch.device("meta")
    engine._scale(0.5)
    assert engine._adam.grad_scale.device == CPU
    assert float(engine._adam.grad_scale) == 2.0


@pytest.mark.parametrize("zero_stage", [1, "replicated"])
def test_bf16_parameters_have_masters_that_hold_more(zero_stage):
    engine = make_engine(Toy(), zero_stage, torch.bfloat16)
    engine.step(batches(0), {"mixer": 0.0, "rest": 1e-5}, 0, stop=False)
    for name, parameter in engine.parameters.items():
        master = masters(engine)[name]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(master.bfloat16(), parameter)
    assert not torch.equal(masters(engine)["0.weight"], engine.parameters["0.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("bucket", [100, 300])
def test_the_size_of_a_reduction_changes_nothing(zero_stage, dtype, bucket, monkeypatch):
    rates = {"mixer": 0.0, "rest": 1e-2}
    whole = make_engine(Toy(), zero_stage, dtype)
    monkeypatch.setattr(deepspeed_config, "BUCKET_ELEMENTS", bucket)  # smaller than the largest parameters
    pieces = make_engine(Toy(), zero_stage, dtype)
    for step in range(3):
        assert whole.step(batches(step), rates, step, stop=False) == pieces.step(batches(step), rates, step, stop=False)


@pytest.mark.parametrize("zero_stage", [0, 1, "offload", "replicated"])
def test_a_parameter_without_gradient_is_only_decayed(zero_stage):
    engine = make_engine(Toy(unused=True), zero_stage)
    engine.step(batches(0), {"mixer": 0.0, "rest": 1e-2}, 0, stop=False)
    decayed = torch.full((3, 3), 1 - 1e-2 * 0.1)
    assert torch.allclose(masters(engine)["unused"], decayed)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, "offload", "replicated"])
def test_state_goes_to_another_engine_and_training_continues_bit_for_bit(zero_stage):
    rates = {"mixer": 0.0, "rest": 1e-2}
    first = make_engine(Toy(), zero_stage)
    for step in range(3):
        first.step(batches(step), rates, step, stop=False)
    second = make_engine(Toy(), zero_stage)
    for source, target in zip(first.held_state(), second.held_state(), strict=True):
        for kind, tensor in target.tensors.items():
            tensor.copy_(source.tensors[kind])
    second.settle()
    second.set_adam_steps(first.adam_steps())
    for step in range(3, 6):
        assert first.step(batches(step), rates, step, stop=False) == second.step(batches(step), rates, step, stop=False)


@pytest.mark.parametrize("zero_stage", [0, 1, "replicated"])
def test_the_state_of_a_transposed_parameter_is_in_its_own_order(zero_stage):
    toy = Toy()
    wanted = toy.student[2].weight.detach().clone()
    toy.student[2].weight.data = wanted.T.contiguous().T
    engine = make_engine(toy, zero_stage)
    assert torch.equal(masters(engine)["2.weight"], wanted)
    engine.step(batches(0), {"mixer": 0.0, "rest": 1e-2}, 0, stop=False)
    assert torch.equal(masters(engine)["2.weight"], toy.student[2].weight)


def test_nothing_to_train_is_told():
    toy = Toy()
    toy.trainable = lambda name: False
    with pytest.raises(UserError, match="nothing is left to train"):
        select_trainable(toy, SECTION)


def test_what_is_decayed_and_at_which_rate_it_learns():
    shapes = {"q.weight": (4, 4), "w0": (1, 1, 4), "w1": (4, 2), "r_k": (2, 2), "norm.weight": (4,), "x_r": (1, 1, 4)}
    chosen = {"mixer": [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()], "rest": []}
    groups = optimizer_groups(chosen, Optimizer(weight_decay=0.1, decay_base_rate=2.0))
    names = {id(parameter): name for name, parameter in chosen["mixer"]}
    found = {names[id(p)]: (group["weight_decay"], group["multiplier"]) for group in groups for p in group["params"]}
    assert {name for name, (decay, _) in found.items() if decay == 0.1} == {"q.weight", "w1", "r_k"}
    assert {name: multiplier for name, (_, multiplier) in found.items() if multiplier != 1} == {"w0": 2.0}


def test_a_multiplied_rate_moves_further():
    toy = Toy()
    toy.student.register_parameter("w0", nn.Parameter(torch.ones(3)))
    toy.student.register_parameter("w9", nn.Parameter(torch.ones(3)))
    plain = toy.forward
    toy.forward = lambda batch: (plain(batch)[0] + toy.student.w0.sum() + toy.student.w9.sum(), {})
    join_group(CPU, 0, 1)
    section = SECTION.model_copy(update={"optimizer": Optimizer(clip=10.0, decay_base_rate=2.0)})
    engine = Engine(toy, section, device=CPU, dtype=torch.float32, zero_stage=1, micro_batch=2, num_micro=2)
    engine.step(batches(0), {"mixer": 0.0, "rest": 1e-2}, 0, stop=False)
    moved = {name: 1 - masters(engine)[name] for name in ("w0", "w9")}
    torch.testing.assert_close(moved["w0"], 2 * moved["w9"])
