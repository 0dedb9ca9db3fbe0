"""MLPs over pieces of a pass's tokens, so that only one piece's inner values are in memory: they are several times as
wide as the model, and long contexts would be limited by them.

Without gradients always; with them where a layer is recomputed in the backward pass (gradient checkpointing), at no
additional arithmetic: the layer's recomputation ends at the MLP's input, and each piece is recomputed as it is needed.
A token's result depends on no other token, so nothing but the order of sums over tokens changes.

Dims: N tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from radlads.model.teacher.family import backbone
from radlads.model.training.hidden_states import family_parts

PIECE = 8192
"""Tokens of a piece: enough for full speed of its products."""


def run_mlps_in_pieces(network: PreTrainedModel, *, recomputed: bool) -> None:
    """Let a network's MLPs run in pieces, in place. recomputed: what trains does with gradient checkpointing; a teacher
    is told as its student is, which may run its modules. Experts, among which tokens are distributed, are left as they
    are."""
    parts = family_parts(network)
    for layer in getattr(backbone(network), parts.layers):
        mlp = getattr(layer, parts.mlp)
        if all(parameter.ndim < 3 for parameter in mlp.parameters()):
            mlp.forward = partial(_in_pieces, mlp, mlp.forward, recomputed)


def _in_pieces(mlp: nn.Module, run: Callable[[Tensor], Tensor], recomputed: bool, x: Tensor) -> Tensor:
    with_gradient = torch.is_grad_enabled()
    if x.shape[:-1].numel() <= PIECE or (with_gradient and not recomputed):
        return run(x)
    if not with_gradient:
        return _whole(run, x)
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    kept = _Keep.apply(x)
    return _Pieces.apply(run, kept.grad_fn, kept, *trained)


def _whole(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([run(piece) for piece in x.flatten(0, -2).split(PIECE)]).view(x.shape)


class _Keep(torch.autograd.Function):
    """The same x, kept before the MLP runs: a recomputation that only needs x ends here."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, dx: Tensor) -> Tensor:
        return dx


class _Pieces(torch.autograd.Function):
    """run(x), piece by piece, with x kept by another node, or here if no earlier parameter trains."""

    @staticmethod
    def forward(ctx: FunctionCtx, run: Callable[[Tensor], Tensor], kept: Any, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.run, ctx.kept, ctx.trained = run, kept, trained
        if kept is None:
            ctx.save_for_backward(x)
        return _whole(run, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = (ctx.kept or ctx).saved_tensors
        # in fp32: sums of many pieces would lose digits in 16 bits
        sums = [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in ctx.trained]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        pieces = (z.flatten(0, -2).split(PIECE) for z in (x, dout, dx))
        for x_ND, dout_ND, dx_ND in zip(*pieces, strict=True):
            x_ND = x_ND.detach().requires_grad_()
            with torch.enable_grad():
                out_ND = ctx.run(x_ND)
            grads = torch.autograd.grad(out_ND, (x_ND, *ctx.trained), dout_ND)
            dx_ND.copy_(grads[0])
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        return None, None, dx, *(total.to(one.dtype) for total, one in zip(sums, ctx.trained, strict=True))
