"""One long sequence as many short ones: an exact split of the recurrence into pieces that run in parallel.

Dims: T time, H heads, K key dim, V value dim, N sequences, P pieces.

Over a piece of tokens the state moves by an affine map, S -> A S + B with A [K,K] and B [K,V] (README.md, "Splitting").
A first run of all pieces in parallel, from the states 0 and I, gives every A and B; a scan over the pieces gives the
state that enters each; a second run, from those states, gives the output. The backward pass is the same with A
transposed.

`compose` and `scan_transitions` suffice for sequence parallelism over GPUs: each rank computes the (A, B) of its
part, gathers the others', and starts its part from the final state of the parts before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Operator = Callable[..., tuple[Tensor, Tensor | None]]


def compose(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The affine map (A [...,K,K], B [...,K,V]) of two pieces, one after the other."""
    (A2, B2), (A1, B1) = later, earlier
    return A2 @ A1, B2 + A2 @ B1


def scan_transitions(A_PKK: Tensor, B_PKV: Tensor) -> tuple[Tensor, Tensor]:
    """The maps from the start of the first piece to the end of every piece, [P,...,K,K] and [P,...,K,V].

    log2(P) steps of batched products; in fp32, since the maps of RWKV-7 do not grow.
    """
    A, B, step = A_PKK, B_PKV, 1
    while step < len(A):
        both = compose((A[step:], B[step:]), (A[:-step], B[:-step]))
        A, B = torch.cat([A[:step], both[0]]), torch.cat([B[:step], both[1]])
        step *= 2
    return A, B


def wkv7_split(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    length: int,
    operator: Operator,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `wkv7`, by pieces of at most `length` tokens; `operator` is any form of wkv7 that takes `cu_seqlens`.

    Worth it when B·H programs leave most of the GPU idle: T/length times as many run in parallel, at the cost given in
    README.md. No host synchronisation of its own. Raises ValueError if `length` is not positive.
    """
    if length < 1:
        raise ValueError(f"wkv7_split: length must be at least 1 token, got {length}")
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    bounds = torch.arange(B + 1, device=v_BTHV.device) * T if cu_seqlens is None else cu_seqlens.to(v_BTHV.device)
    pieces = cut(bounds.long(), B * T, length)
    if initial_state is None:
        initial_state = torch.zeros(bounds.numel() - 1, H, K, V, dtype=dtype, device=v_BTHV.device)
    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    flat = (x.reshape(1, B * T, H, -1) for x in inputs)
    out, final_state = _Split.apply(operator, pieces, dtype, initial_state, *flat)
    return out.view(v_BTHV.shape), (final_state if output_final_state else None)


@dataclass(frozen=True)
class Pieces:
    """Cut points of sequences, on the device. Surplus pieces are empty and at the end."""

    bounds: Tensor  # [P+1]: cu_seqlens of the pieces
    sequence: Tensor  # [P]
    is_first: Tensor  # [P]: of its sequence
    is_last: Tensor  # [P]
    first: Tensor  # [N]: piece of every sequence
    last: Tensor  # [N]


def cut(bounds_N1: Tensor, T: int, length: int) -> Pieces:
    """Cut the sequences between `bounds_N1` into pieces of at most `length` tokens, an empty one into one empty piece.

    The number of pieces, T // length + N, is known without looking at the bounds: no host synchronisation.
    """
    num_sequences = bounds_N1.numel() - 1
    counts = ((bounds_N1.diff() + length - 1) // length).clamp(min=1)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    piece = torch.arange(T // length + num_sequences, device=bounds_N1.device)
    real = piece < offsets[-1]
    sequence = (torch.searchsorted(offsets, piece, right=True) - 1).clamp(max=num_sequences - 1)
    start = bounds_N1[sequence] + (piece - offsets[sequence]) * length
    start = torch.where(real, start, bounds_N1[-1])
    return Pieces(
        torch.cat([start, bounds_N1[-1:]]),
        sequence,
        real & (piece == offsets[sequence]),
        real & (piece == offsets[sequence + 1] - 1),
        offsets[:-1],
        offsets[1:] - 1,
    )


def states_before(A_PHKK: Tensor, B_PHKV: Tensor, initial_NHKV: Tensor, pieces: Pieces) -> Tensor:
    """The state that enters every piece, [P,H,K,V]: its sequence's initial state, or the previous piece's final
    state."""
    initial = initial_NHKV.to(A_PHKK.dtype)[pieces.sequence]
    first = pieces.is_first[:, None, None, None]
    # a first piece does not depend on earlier states: its map is constant
    _, left = scan_transitions(A_PHKK.masked_fill(first, 0), torch.where(first, B_PHKV + A_PHKK @ initial, B_PHKV))
    return torch.where(first, initial, torch.cat([torch.zeros_like(left[:1]), left[:-1]]))


def gradients_after(A_PHKK: Tensor, own_PHKV: Tensor, dfinal_NHKV: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Gradients of the states that leave and that enter every piece, [P,H,K,V] each.

    `own_PHKV` is the gradient of the entering state through the piece's own outputs alone.
    """
    dfinal = dfinal_NHKV.to(A_PHKK.dtype)[pieces.sequence]
    last = pieces.is_last[:, None, None, None]
    back = A_PHKK.mT
    _, entering = scan_transitions(
        back.masked_fill(last, 0).flip(0), torch.where(last, own_PHKV + back @ dfinal, own_PHKV).flip(0)
    )
    entering = entering.flip(0)
    return torch.where(last, dfinal, torch.cat([entering[1:], torch.zeros_like(entering[:1])])), entering


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        operator: Operator,
        pieces: Pieces,
        dtype: torch.dtype,
        initial_state: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b = inputs
        P, (H, K), V = len(pieces.sequence), k.shape[2:], v.shape[3]
        wide = torch.cat([v, v.new_zeros(*v.shape[:3], K)], -1)
        start = torch.zeros(P, H, K, V + K, dtype=dtype, device=v.device)
        start[..., V:].diagonal(dim1=-2, dim2=-1).fill_(1)
        options: dict[str, Any] = {"cu_seqlens": pieces.bounds, "output_final_state": True}
        _, moved = operator(r, w, k, wide, a, b, initial_state=start, **options)
        A, B = moved[..., V:], moved[..., :V]
        before = states_before(A, B, initial_state, pieces)
        ctx.operator, ctx.pieces, ctx.state_dtype = operator, pieces, initial_state.dtype
        ctx.save_for_backward(*inputs, before, A)
        out, final = operator(*inputs, initial_state=before, **options)
        return out, final[pieces.last]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, A = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in leaves]
        with torch.enable_grad():  # recomputed: a graph kept here would bypass activation checkpointing
            out, final = ctx.operator(
                *leaves[:6], initial_state=leaves[6], cu_seqlens=ctx.pieces.bounds, output_final_state=True
            )
        nothing = torch.zeros_like(final)
        (own,) = torch.autograd.grad((out, final), leaves[6:], (dout, nothing), retain_graph=True)
        after, entering = gradients_after(A, own, dfinal, ctx.pieces)
        grads = torch.autograd.grad((out, final), leaves[:6], (dout, after))
        return None, None, None, entering[ctx.pieces.first].to(ctx.state_dtype), *grads
