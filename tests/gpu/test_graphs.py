"""Training passes recorded as CUDA graphs, beside the same engine without them: losses, gradients, phases, a resume."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.model.training.fused_modules import fuse_modules
from radlads.model.training.objectives import build_objective
from radlads.model.training.recompute import recompute_cheap
from radlads.tasks.contracts.recipe.loss_terms import RopeFade
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Finetune, Phase, Training
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec
from radlads.tasks.jobs.process_group import join_group
from radlads.tasks.jobs.train.engines.pass_graphs import NUM_EAGER, PassRecorder
from radlads.tasks.jobs.train.engines.replicated_engine import ReplicatedEngine
from radlads.tasks.jobs.train.schedule import learning_rates

CUDA = torch.device("cuda", 0)
SIZES = {"context": 128, "batch": 4, "micro_batch": 2}
PHASES = (
    Phase(tokens=6 * 512, temperature=2.0, ce_spikes={"every": 2, "weight": 0.5}),
    Phase(tokens=6 * 1024, context=256, ce_weight=0.1, divergence="reverse", hidden_weight=0.1),
)
SECTIONS: dict[str, Training] = {
    "align": Align(tokens=8 * 512, **SIZES),
    "distill": Distill(tokens=6 * 512 + 6 * 1024, phases=PHASES, **SIZES),
    "finetune": Finetune(tokens=8 * 512, assistant_only=True, **SIZES),
}
FADING = Distill(tokens=8 * 512, rope_fade=RopeFade(tokens=6 * 512), **SIZES)


def build(
    stage: str, *, graphs: bool, selective: bool = False, full: bool = False, fades: bool = False
) -> ReplicatedEngine:
    """A fresh engine in bf16; equal ones at each call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "tie_word_embeddings": True}
    config = AutoConfig.for_model("llama", **shape, initializer_range=0.1, dtype="bfloat16")
    teacher: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    options = {"options": {}, "attention_layers": (1,), "attention_rope": not fades}
    options |= {"attention_log_scale": 16} if fades else {}
    student: Any = build_student(config, variant="rad_rwkv7", **options)
    transplant(teacher, student)
    for network in (teacher, student):
        fuse_modules(network.to(CUDA, torch.bfloat16), CUDA)
    if selective:
        recompute_cheap(student)
    if full:
        how = {"use_reentrant": False, "preserve_rng_state": False}
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    section = FADING if fades else SECTIONS[stage]
    spec = TrainSpec(objective=stage, section=section, teacher=TeacherRef(path="x", fingerprint="y"))
    join_group(CUDA, 0, 1)
    return ReplicatedEngine(
        build_objective(spec, student, teacher), section, device=CUDA, dtype=torch.bfloat16, micro_batch=2, num_micro=2,
        make_recorder=partial(PassRecorder, CUDA) if graphs else None, strict=True,
    )  # fmt: skip


def batches(step: int, context: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for _ in range(2):
        ids = torch.randint(0, 2048, (2, context + 1), generator=generator)
        made.append({"input_ids": ids, "loss_mask": torch.rand(ids.shape, generator=generator) < 0.7})
    return made


def train(engine: ReplicatedEngine, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    section: Any = engine.objective.section
    seen = []
    for index in steps:
        phase, own = section.place(index)
        if phase > 0 and own == 0:
            engine.accumulate(2, 2)
        engine.objective.begin_step(index)
        context = section.parts[phase].context
        result = engine.step(batches(index, context), learning_rates(section, index), index + 1, stop=False)
        seen.append((result.metrics["loss"], result.grad_norm))
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"selective": True}, {"full": True}], ids=["all kept", "selective", "full"])
@pytest.mark.parametrize("stage", SECTIONS)
def test_a_replay_is_the_pass(stage: str, how: dict[str, bool]) -> None:
    """Loss and gradient of each pass, as close to an eager one as two eager ones are to each other, and no closer."""
    one, other = build(stage, graphs=False, **how), build(stage, graphs=False, **how)
    recorded = build(stage, graphs=True, **how)
    for number in range(NUM_EAGER + 3):
        found = []
        for engine in (one, other, recorded):
            engine.objective.train()
            engine.objective.begin_step(0)
            values = engine._pass(batches(number, 128)[0], 0.7)
            found.append((values["loss"].item(), engine._sum.clone()))
            engine._sum.zero_()
        (loss, gradient), (loss_again, again), (replayed, theirs) = found
        noise = (again - gradient).norm()
        assert gradient.norm() > 0
        assert abs(replayed - loss) <= 2 * abs(loss_again - loss) + 1e-6 * abs(loss)
        assert (theirs - gradient).norm() <= 3 * noise + 1e-5 * gradient.norm()
    kinds = recorded._graphs._kinds
    assert [kind.replay is not None for kind in kinds.values()] == [True]


@pytest.mark.gpu
def test_a_replay_follows_positions_that_fade() -> None:
    eager, recorded = (build("distill", graphs=graphs, fades=True) for graphs in (False, True))
    losses: list[float] = []
    for step in (0, 0, 0, 2, 4, 6, 0):
        found = []
        for engine in (eager, recorded):
            engine.objective.train()
            engine.objective.begin_step(step)
            found.append(engine._pass(batches(0, 128)[0], 0.7)["loss"].item())
        assert found[1] == pytest.approx(found[0], rel=1e-5)
        losses.append(found[1])
    assert [kind.replay is not None for kind in recorded._graphs._kinds.values()] == [True]
    assert losses[-1] == losses[2]
    assert len(set(losses[2:6])) == 4


@pytest.mark.gpu
def test_phases_spikes_and_a_resume() -> None:
    steps = SECTIONS["distill"].num_steps
    expected = train(build("distill", graphs=False), range(steps))
    recorded = build("distill", graphs=True)
    seen = train(recorded, range(5))
    resumed = build("distill", graphs=True)
    for source, target in zip(recorded.held_state(), resumed.held_state(), strict=True):
        for kind, tensor in target.tensors.items():
            tensor.copy_(source.tensors[kind])
    resumed.settle()
    resumed.set_adam_steps(recorded.adam_steps())
    assert resumed.adam_steps() == 5
    rest = train(recorded, range(5, steps))
    again = train(resumed, range(5, steps))
    for got in (seen + rest, seen + again):
        for (loss, norm), (loss_eager, norm_eager) in zip(got, expected, strict=True):
            assert loss == pytest.approx(loss_eager, rel=5e-3)
            assert norm == pytest.approx(norm_eager, rel=5e-2)
    assert recorded._graphs._kinds, "of the second phase"
    assert all(kind.replay is not None for kind in recorded._graphs._kinds.values())
