"""Selective activation checkpointing: the same gradients bit for bit, less is kept, and no projection runs twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from radlads.model.training.objectives import build_objective
from radlads.model.training.recompute import recompute_cheap
from radlads.tasks.contracts.recipe.recipe import Align, Distill
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec


class Products(TorchDispatchMode):
    """Counts matrix products."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.seen += 1
        return func(*args, **(kwargs or {}))


def run(student: Any, teacher: Any, tokens: Tensor, stage: str) -> tuple[Tensor, dict[str, Tensor], int, int]:
    """(loss, gradients, bytes that the pass kept, products) of a training pass."""
    section = {"align": Align, "distill": Distill}[stage](tokens=100, context=20, batch=2)
    spec = TrainSpec(objective=stage, section=section, teacher=TeacherRef(path="x", fingerprint="y"))
    built = build_objective(spec, student, teacher).train()
    trained = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(built.trainable(name))
        if parameter.requires_grad:
            trained[name] = parameter
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    products = Products()
    with products:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = built({"input_ids": tokens})
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return loss, {n: g for n, g in zip(trained, found, strict=True) if g is not None}, size, products.seen


@pytest.mark.parametrize(
    ("stage", "family", "how"),
    [
        ("distill", "llama", {}),
        ("distill", "qwen3", {"variant": "hxa07b", "attention_layers": (1,), "attention_rope": True}),
        ("align", "qwen2", {"variant": "hxa079"}),
    ],
)
def test_gradients_are_the_same_and_less_is_kept(
    make_teacher: Any, make_student: Any, tokens: Tensor, stage: str, family: str, how: dict[str, Any]
) -> None:
    teacher = make_teacher(family)
    loss, gradients, kept, products = run(make_student(teacher, **how), teacher, tokens, stage)
    selective = make_student(teacher, **how)
    recompute_cheap(selective)
    again, others, less, repeated = run(selective, teacher, tokens, stage)
    assert torch.equal(loss, again)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert less < 0.75 * kept
    narrow = [(m, f"{name}2") for m in selective.mixers().values() for name in "wavkg" if hasattr(m, f"{name}2")]
    assert repeated - products == len(narrow), "second factors of low-rank maps run twice, and nothing else"


def test_judging_computes_nothing_twice(make_teacher: Any, make_student: Any, tokens: Tensor) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher)
    expected = student(tokens).logits
    recompute_cheap(student)
    assert torch.equal(student.eval()(tokens).logits, expected)
    generated = student.generate(tokens[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 7)
