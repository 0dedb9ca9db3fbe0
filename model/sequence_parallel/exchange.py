"""Exchanges between the ranks that share rows, as differentiable functions.

The backward pass of each is the exchange in the other direction, of gradients, summed and never averaged. All ranks
call them in the same order, forward and backward, because all run the same layers.

Dims: P ranks of a group, B rows, D width, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.split import gradient_after, state_before


def gather(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """Every rank's x, [P, *x.shape], in the order of ranks; not differentiable."""
    x = x.contiguous()
    gathered = x.new_empty(group.size(), *x.shape)
    distributed.all_gather(list(gathered.unbind()), x, group=group)
    return gathered


class EnteringState(torch.autograd.Function):
    """A [B,H,K,K] and B [B,H,K,V] of this rank's part (kernels/shared/split.py) -> the state [B,H,K,V] that enters."""

    @staticmethod
    def forward(ctx: FunctionCtx, group: distributed.ProcessGroup, A: Tensor, B: Tensor) -> Tensor:
        K = A.shape[-1]
        maps = gather(torch.cat([A, B], -1), group)
        state = state_before(maps[..., :K], maps[..., K:], group.rank())
        ctx.group = group
        ctx.save_for_backward(maps[..., :K].contiguous(), state)
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dstate: Tensor) -> tuple[None, Tensor, Tensor]:
        A_P, state = ctx.saved_tensors
        dB = gradient_after(A_P, gather(dstate, ctx.group), ctx.group.rank())
        return None, dB @ state.mT, dB


class FromRankBefore(torch.autograd.Function):
    """x of this rank -> that of the rank before it, zeros in the first one."""

    @staticmethod
    def forward(ctx: FunctionCtx, group: distributed.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return _neighbour(x, group, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dx: Tensor) -> tuple[None, Tensor]:
        return None, _neighbour(dx, ctx.group, 1)


class AllToAll(torch.autograd.Function):
    """[P, ...] -> [P, ...]: slice p goes to rank p, and comes from rank p."""

    @staticmethod
    def forward(ctx: FunctionCtx, group: distributed.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dx: Tensor) -> tuple[None, Tensor]:
        return None, _all_to_all(dx, ctx.group)


def _neighbour(x: Tensor, group: distributed.ProcessGroup, step: int) -> Tensor:
    place, everyone = group.rank() + step, gather(x, group)
    return everyone[place].clone() if 0 <= place < group.size() else torch.zeros_like(x)


def _all_to_all(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    distributed.all_to_all_single(received, x, group=group)
    return received
