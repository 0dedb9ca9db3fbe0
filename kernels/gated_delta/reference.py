"""The gated delta rule, token by token: the executable specification that every other form is tested against.

Dims: B batch, T time, H heads, K key dim per head, V value dim per head, N packed sequences.

Per head, with the state S [K, V] (keys index rows) and decay_t = exp(log_decay_t), one number a head:

    S_t = decay_t (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ
    o_t = q_tᵀ S_t

Source: Gated DeltaNet (Yang, Kautz, Hatamizadeh), arXiv 2412.06464, equation 10, with its state transposed. There k has
unit norm and beta lies in (0, 1), so that a write replaces the value stored at its key.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def gated_delta_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence as a loop, in fp32 (fp64 for fp64 inputs); differentiable by autograd. Any decay, any T.

    Returns `(out [B,T,H,V] in v's dtype, final state [B or N,H,K,V] in fp32 (fp64) or None)`.
    """
    dtype = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    q, k, v, log_decay, beta = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH))
    B, T, H, K = k.shape
    if cu_seqlens is None:
        spans = [(slice(0, B), 0, T)]
    else:
        spans = [(slice(0, 1), start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    if initial_state is None:
        num_states = B if cu_seqlens is None else len(spans)
        initial_state = torch.zeros(num_states, H, K, v.shape[-1], dtype=dtype, device=v.device)
    states = list(initial_state.to(dtype).split(B if cu_seqlens is None else 1))
    outs = []
    for n, (rows, start, stop) in enumerate(spans):
        state = states[n]
        for t in range(start, stop):
            row = (rows, t)
            state = log_decay[row].exp()[..., None, None] * state
            change = v[row] - torch.einsum("bhk,bhkv->bhv", k[row], state)
            state = state + k[row][..., None] * (beta[row][..., None] * change)[..., None, :]
            outs.append(torch.einsum("bhk,bhkv->bhv", q[row], state))
        states[n] = state
    out = torch.stack(outs, 1).to(v_BTHV.dtype)
    return out, (torch.cat(states) if output_final_state else None)
