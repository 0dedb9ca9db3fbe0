"""MLPs over pieces of the tokens: the same loss and gradients, no further arithmetic, and small inner values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from radlads.kernels.shared.testing import relative_rms
from radlads.model.training import mlp_pieces
from radlads.model.training.objectives import OBJECTIVES
from radlads.tasks.contracts.recipe.recipe import Distill

PIECE = 5


def step(objective: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    for name, parameter in objective.student.named_parameters():
        parameter.requires_grad_(objective.trainable(name))
    loss, _ = objective({"input_ids": tokens})
    return [loss, *torch.autograd.grad(loss, [one for one in objective.parameters() if one.requires_grad])]


@pytest.mark.parametrize(
    ("freeze", "dtype"), [((), torch.float64), (("mlp",), torch.float64), ((), torch.bfloat16)], ids=str
)
def test_pieces_are_the_whole(make_teacher, make_student, tokens, monkeypatch, freeze, dtype):
    teacher, sizes = make_teacher("llama"), list[int]()
    student = make_student(teacher)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    section = Distill(tokens=99, context=20, batch=2, freeze=freeze)
    objective = OBJECTIVES["distill"](section, student.to(dtype), teacher.to(dtype)).train()
    whole = step(objective, tokens)
    monkeypatch.setattr(mlp_pieces, "PIECE", PIECE)
    for network, recomputed in ((student, True), (teacher, False)):
        mlp_pieces.run_mlps_in_pieces(network, recomputed=recomputed)
    hooks = [layer.mlp.down_proj.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
             for layer in student.model.layers]  # fmt: skip
    pieces = step(objective, tokens)
    for hook in hooks:
        hook.remove()
    for found, wanted in zip(pieces, whole, strict=True):
        assert found.dtype == wanted.dtype
        assert relative_rms(found, wanted) < (1e-12 if dtype == torch.float64 else 2e-2)
    assert max(sizes) == PIECE
    assert sum(sizes) == 2 * tokens[:, 1:].numel() * len(student.model.layers), "each piece is recomputed once"


def test_of_frozen_layers_before_it(make_teacher, make_student, tokens, monkeypatch):
    """An MLP may train where nothing before it does."""
    student = make_student(make_teacher("llama"), attention_layers=(0,))
    monkeypatch.setattr(mlp_pieces, "PIECE", PIECE)
    mlp = student.model.layers[0].mlp
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    (wanted,) = torch.autograd.grad(mlp(x).square().sum(), [mlp.up_proj.weight])
    mlp_pieces.run_mlps_in_pieces(student, recomputed=True)
    (found,) = torch.autograd.grad(mlp(x).square().sum(), [mlp.up_proj.weight])
    torch.testing.assert_close(found, wanted)


def test_experts_and_layers_that_are_not_recomputed_stay_whole(make_teacher, tokens, monkeypatch):
    monkeypatch.setattr(mlp_pieces, "PIECE", PIECE)
    experts, dense = make_teacher("qwen3_moe"), make_teacher("qwen3").requires_grad_(True)
    sizes: list[int] = []
    for network in (experts, dense):
        mlp_pieces.run_mlps_in_pieces(network, recomputed=False)
    assert "forward" not in vars(experts.model.layers[0].mlp)
    dense.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    dense(tokens)
    with torch.no_grad():
        dense(tokens[:, :10])
    assert sizes == [2, 5, 5, 5, 5]
