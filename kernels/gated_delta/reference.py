"""The gated delta rule, token by token: the executable specification that every other form is tested against.

Dims: B batch, T time, H heads, K key dim per head, V value dim per head, N packed sequences.

Per head, with the state S [K, V] (keys index rows) and decay_t = exp(log_decay_t), one number a head:

    S_t = decay_t (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ
    o_t = q_tᵀ S_t

Source: Gated DeltaNet (Yang, Kautz, Hatamizadeh), arXiv 2412.06464, equation 10, with its state transposed. There k has
unit norm and beta lies in (0, 1), so that a write replaces the value stored at its key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radlads.kernels.shared.sequential import run_sequentially


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
    return run_sequentially(
        _token,
        (q_BTHK, log_decay_BTH, k_BTHK, v_BTHV, beta_BTH),
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def _token(state: Tensor, q: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    state = log_decay.exp()[..., None, None] * state
    change = v - torch.einsum("bhk,bhkv->bhv", k, state)
    state = state + k[..., None] * (beta[..., None] * change)[..., None, :]
    return state, torch.einsum("bhk,bhkv->bhv", q, state)
