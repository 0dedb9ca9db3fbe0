"""The RAD-RWKV6 recurrence, token by token: the executable specification that every other form is tested against.

Dims: B batch, T time, H heads, K key dim per head, V value dim per head, N packed sequences.

Per head, with the state S [K, V] (keys index rows):

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tᵀ
    o_t = r_tᵀ S_t

Source: RADLADS, arXiv 2505.03005, appendix A.1 (RWKV-6 without bonus and without the one-token delay, as in gated
linear attention, arXiv 2312.06635); the log decay lies in [-5, 0).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def wkv6_reference(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as a loop, in fp32 (fp64 for fp64 inputs); differentiable by autograd. Any decay, any T.

    Returns `(out [B,T,H,V] in v's dtype, final state [B or N,H,K,V] in fp32 (fp64) or None)`.
    """
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    r, w, k, v = (x.to(dtype) for x in (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV))
    B, T, H, K = k.shape
    V = v.shape[-1]
    if cu_seqlens is None:
        spans = [(slice(0, B), 0, T)]
    else:
        spans = [(slice(0, 1), start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    num_states = B if cu_seqlens is None else len(spans)
    if initial_state is None:
        initial_state = torch.zeros(num_states, H, K, V, dtype=dtype, device=v.device)
    states = list(initial_state.to(dtype).split(B if cu_seqlens is None else 1))
    outs = []
    for n, (rows, start, stop) in enumerate(spans):
        state = states[n]
        for t in range(start, stop):
            row = (rows, t)
            state = w[row].exp()[..., None] * state + k[row][..., None] * v[row][..., None, :]
            outs.append(torch.einsum("bhk,bhkv->bhv", r[row], state))
        states[n] = state
    out = torch.stack(outs, 1).to(v_BTHV.dtype)
    return out, (torch.cat(states) if output_final_state else None)
