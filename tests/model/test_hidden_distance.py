"""The distance of hidden states after every layer, as a part of distill's loss."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from radlads.kernels.shared.testing import relative_rms
from radlads.model.training.hidden_states import decoder_layers
from radlads.model.training.objectives import Objective, build_objective
from radlads.model.training.objectives import hidden_distance as module
from radlads.model.training.objectives.hidden_distance import HiddenDistance
from radlads.model.training.recompute import recompute_cheap
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Distill, Phase
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec


def objective(student: Any, teacher: Any, **changes: Any) -> Objective:
    section = Distill(**{"tokens": 400, "context": 20, "batch": 2, **changes})
    spec = TrainSpec(objective="distill", section=section, teacher=TeacherRef(path="x", fingerprint="y"))
    built = build_objective(spec, student, teacher).train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(built.trainable(name))
        parameter.grad = None
    return built


def states(model: Any, ids: Tensor) -> list[Tensor]:
    """The residual stream after every layer: what the next layer reads, and the final norm."""
    seen: list[Tensor] = []
    inner = model.model
    readers = [*decoder_layers(model)[1:], inner.norm]
    handles = [
        reader.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for reader in readers
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    pairs = zip(states(student, ids), states(teacher, ids), strict=True)
    return torch.stack([((h - t).square().sum(-1) / t.square().sum(-1)).mean() for h, t in pairs]).mean()


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", {}),
        ("qwen3", {"attention_layers": (1,), "attention_rope": True}),
        ("gemma3_text", {}),
        ("qwen3_5_text", {}),
    ],
)
def test_it_is_the_mean_over_layers_and_tokens(make_teacher, make_student, tokens, family: str, how: Any) -> None:
    teacher = make_teacher(family)
    student = make_student(teacher, **how)
    without = objective(student, teacher)({"input_ids": tokens})
    loss, metrics = objective(student, teacher, hidden_weight=0.7)({"input_ids": tokens})
    wanted = by_hand(student, teacher, tokens[:, :-1])
    torch.testing.assert_close(metrics["hidden"], wanted.detach())
    assert wanted > 1e-3
    torch.testing.assert_close(loss, without[0] + 0.7 * wanted)
    assert metrics["loss"] == loss
    assert "hidden" not in without[1]


def test_gradients_are_those_of_the_plain_loss(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("qwen3").double()
    student = make_student(teacher).double()
    found = []
    for weight in (0.0, 1.0):
        built = objective(student, teacher, hidden_weight=weight, kl_weight=1.0)
        trained = [p for p in student.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(built({"input_ids": tokens})[0], trained, allow_unused=True))
    plain = torch.autograd.grad(by_hand(student, teacher, tokens[:, :-1]), trained, allow_unused=True)
    for without, both, alone in zip(*found, plain, strict=True):
        if alone is not None:
            assert relative_rms(both - without, alone) < 2e-6  # norms compute in fp32


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("how", ["layers", "selective"])
def test_checkpointing_changes_no_gradient(make_teacher, make_student, tokens, how: str, reset: bool) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher, attention_layers=(1,))
    batch = {"input_ids": tokens, "document_ids": (torch.arange(21) > 8).long().expand(2, -1)}
    built = objective(student, teacher, hidden_weight=0.5, reset_at_documents=reset)
    found = []
    for again in (False, True):
        if again and how == "selective":
            recompute_cheap(student)
        elif again:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.zero_grad()
        loss, metrics = built(batch)
        loss.backward()
        assert metrics["hidden"] > 0
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_reentrant_checkpoints_around_a_layers_hooks_are_refused(make_teacher, make_student, tokens) -> None:
    """Inside them nothing has a gradient, so the loss would silently train nothing."""
    teacher = make_teacher("llama")
    student = make_student(teacher)
    distance = HiddenDistance()
    with torch.no_grad():
        with distance.watch_teacher(teacher):
            teacher(tokens)
        with distance.watch_student(student):
            student(tokens)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        distance.mean()


def test_a_student_that_is_its_teacher_has_no_distance(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, attention_layers=(0, 1, 2), attention_rope=True)
    _, metrics = objective(student, teacher, hidden_weight=1.0)({"input_ids": tokens})
    assert metrics["hidden"] == 0


@pytest.mark.parametrize("graded", [True, False])
def test_the_teachers_states_are_held_no_longer_than_needed(
    make_teacher, make_student, tokens, monkeypatch, graded: bool
) -> None:
    """With gradients until the backward pass, without them until the student's layer has run."""
    held: list[Any] = []
    waiting: list[int] = []

    class Watched(HiddenDistance):
        def _term(self, layer: int, out: Tensor) -> Tensor:
            waiting.append(sum(one() is not None for one in held))
            return super()._term(layer, out)

        def watch_teacher(self, teacher: Any) -> Any:
            return module._layer_outputs(
                teacher, lambda layer, out: (held.append(weakref.ref(out)), self._wanted.__setitem__(layer, out))
            )

    monkeypatch.setattr("radlads.model.training.objectives.distill.HiddenDistance", Watched)
    teacher = make_teacher("llama")
    built = objective(make_student(teacher), teacher, hidden_weight=1.0)
    with torch.set_grad_enabled(graded):
        loss, _ = built({"input_ids": tokens})
    assert waiting[0] == 3
    if graded:
        loss.backward()
    else:
        assert waiting == [3, 2, 1]
    assert all(one() is None for one in held)


def test_each_phase_has_its_weight_and_judging_the_last_ones(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    built = objective(
        make_student(teacher), teacher, phases=(Phase(tokens=200, hidden_weight=2.0), Phase(tokens=200))
    )  # fmt: skip
    loss, metrics = built({"input_ids": tokens})
    torch.testing.assert_close(loss.detach(), metrics["kl"] + 2 * metrics["hidden"])
    built.begin_step(5)
    assert "hidden" not in built({"input_ids": tokens})[1]
    built.begin_step(0)
    built.eval()
    assert "hidden" not in built({"input_ids": tokens})[1]
    other = objective(built.student, teacher, hidden_weight=0.5)
    trained = other({"input_ids": tokens})[1]
    other.eval()
    with torch.no_grad():
        judged = other({"input_ids": tokens})[1]
    torch.testing.assert_close(judged["hidden"], trained["hidden"])


def test_nothing_is_left_behind(make_teacher, make_student, tokens, monkeypatch) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher)
    built = objective(student, teacher, hidden_weight=1.0)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(student.model.norm, "forward", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        built({"input_ids": tokens})
    for network in (student, teacher):
        assert not any(layer._forward_hooks for layer in decoder_layers(network))


def test_layers_that_cannot_be_compared_are_told(make_teacher, make_student) -> None:
    teacher = make_teacher("llama")
    larger = make_teacher("llama", num_hidden_layers=4)
    student = make_student(teacher)
    objective(student, larger)
    with pytest.raises(UserError, match="student has 3 layers of width 32 and the teacher 4 of width 32"):
        objective(student, larger, hidden_weight=0.1)
