"""A recurrence run token by token: the common loop of the reference forms.

Dims: B batch, T time, H heads, K key dim per head, V value dim per head, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from radlads.kernels.shared.slots import sum_type, zero_states

Token = Callable[..., tuple[Tensor, Tensor]]
"""(state [B,H,K,V], one token of each input, [B,H,·] or [B,H]) -> (the state after it, its output [B,H,V])."""


def run_sequentially(
    token: Token,
    inputs: tuple[Tensor, ...],
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`(out [B,T,H,V] in v's dtype, final state [B or N,H,K,V] in fp32 (fp64) or None)`; differentiable by autograd.

    inputs: r (or q), log_decay, k, v and the recurrence's further inputs, [B,T,H,·] or [B,T,H], in the order of
    `token`'s arguments.
    """
    _, _, k, v = inputs[:4]
    dtype = sum_type(v)
    wide = [x.to(dtype) for x in inputs]
    B, T = k.shape[:2]
    if cu_seqlens is None:
        spans = [(slice(0, B), 0, T)]
    else:
        spans = [(slice(0, 1), start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    if initial_state is None:
        initial_state = zero_states(k, v, cu_seqlens)
    states = list(initial_state.to(dtype).split(B if cu_seqlens is None else 1))
    outs = []
    for n, (rows, start, stop) in enumerate(spans):
        for t in range(start, stop):
            states[n], out = token(states[n], *(x[rows, t] for x in wide))
            outs.append(out)
    return torch.stack(outs, 1).to(v.dtype), (torch.cat(states) if output_final_state else None)
