"""The RAD-RWKV6 recurrence, token by token: the executable specification that every other form is tested against.

Dims: B batch, T time, H heads, K key dim per head, V value dim per head, N packed sequences.

Per head, with the state S [K, V] (keys index rows):

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tᵀ
    o_t = r_tᵀ S_t

Source: RADLADS, arXiv 2505.03005, appendix A.1 (RWKV-6 without bonus and without the one-token delay, as in gated
linear attention, arXiv 2312.06635); the log decay lies in [-5, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from radlads.kernels.shared.sequential import run_sequentially


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
    return run_sequentially(
        _token,
        (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV),
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def _token(state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = w.exp()[..., None] * state + k[..., None] * v[..., None, :]
    return state, torch.einsum("bhk,bhkv->bhv", r, state)
