"""A recurrence over one part of every row, whose earlier parts run elsewhere at the same time (sequence parallelism).

Dims: B rows, T time (of a part), H heads, K key dim, V value dim, N packed sequences, P parts of a row.

Over a part of tokens the state moves by an affine map, S -> A S + B, with A [K,K] and B [K,V], and a part's outputs are
linear in the state that enters it: o_t = own_t + R_tᵀ S. Two runs of the operator give all of it: of the values, from
the state 0 (own and B), and of no values, from the state I (R and A). So all parts run at once, and hand each other
nothing but A and B. Any operator of this package can be split, because all are affine in the state.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from radlads.kernels.shared.slots import sum_type

Operator = Callable[..., tuple[Tensor, Tensor | None]]


class PartOfRows(NamedTuple):
    """What a part of every row does to a state that is not known yet."""

    own: Tensor
    """[B,T,H,V], the outputs from the state 0."""
    reads: Tensor
    """[B,T,H,K], R: what the outputs read of the entering state; 0 where a document began in between."""
    A: Tensor
    """[B,H,K,K], fp32 (fp64): 0 where a document began in between."""
    B: Tensor
    """[B,H,K,V], likewise: the state that leaves where 0 enters."""

    def outputs(self, entering_BHKV: Tensor) -> Tensor:
        """The outputs [B,T,H,V] from a state, in the operator's dtype; sums are in the state's."""
        read = torch.einsum("bthk,bhkv->bthv", self.reads.to(entering_BHKV.dtype), entering_BHKV)
        return (self.own + read).to(self.own.dtype)


def run_part(
    operator: Operator,
    inputs: tuple[Tensor, ...],
    *,
    cu_seqlens: Tensor | None = None,
    continues_B: Tensor | None = None,
) -> PartOfRows:
    """Run an operator of radlads.kernels over a part of every row; inputs [B,T,H,·] or [B,T,H] in its order.

    cu_seqlens: int [N+1], document bounds in the flattened [B·T], row bounds included. continues_B: bool, whether the
    first token of a row's part goes on with a document of the part before; None: all do. Differentiable in the inputs;
    no host synchronisation of its own.
    """
    names = list(signature(operator).parameters)
    at = names.index("v_BTHV")
    (B, T, H, K), v = inputs[names.index("k_BTHK")].shape, inputs[at]
    start = torch.eye(K, dtype=sum_type(v), device=v.device).repeat(B, H, 1, 1)
    if continues_B is not None:
        start = start * continues_B[:, None, None, None]
    last: Tensor | slice = slice(None)
    if cu_seqlens is not None:
        inputs = tuple(x.reshape(1, B * T, *x.shape[2:]) for x in inputs)
        bounds, rows = cu_seqlens.long(), torch.arange(B + 1, device=v.device) * T
        last = torch.searchsorted(bounds, rows[1:]) - 1
        states = start.new_zeros(len(bounds) - 1, H, K, K)
        states[torch.searchsorted(bounds, rows[:-1], right=True) - 1] = start
        start = states
    own, B_HKV = operator(*inputs, output_final_state=True, cu_seqlens=cu_seqlens)
    nothing = inputs[at].new_zeros(*inputs[at].shape[:3], K)
    inputs = (*inputs[:at], nothing, *inputs[at + 1 :])
    reads, A_HKK = operator(*inputs, initial_state=start, output_final_state=True, cu_seqlens=cu_seqlens)
    return PartOfRows(own.view(v.shape), reads.view(B, T, H, K), A_HKK[last], B_HKV[last])


def state_before(A_PBHKK: Tensor, B_PBHKV: Tensor, part: int) -> Tensor:
    """The state [B,H,K,V] that enters part `part` (counted from 0) of rows that begin with the state 0."""
    state = torch.zeros_like(B_PBHKV[0])
    for A, B in zip(A_PBHKK[:part], B_PBHKV[:part], strict=True):
        state = B + A @ state
    return state


def gradient_after(A_PBHKK: Tensor, own_PBHKV: Tensor, part: int) -> Tensor:
    """The gradient [B,H,K,V] of the state that leaves part `part`. own: of each part's entering state, through that
    part's outputs alone."""
    gradient = torch.zeros_like(own_PBHKV[0])
    for A, own in zip(A_PBHKK[part + 1 :].flip(0), own_PBHKV[part + 1 :].flip(0), strict=True):
        gradient = own + A.mT @ gradient
    return gradient
