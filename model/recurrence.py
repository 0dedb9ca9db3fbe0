"""How a mixer runs the RWKV-7 recurrence: whole sequences, packed documents, one token on a kept state.

Dims: B batch, T time, H query heads, K key dim, V value dim per head, N packed documents. Needs torch only: an exported
model carries this file.
"""

from __future__ import annotations

from torch import Tensor

from radlads.kernels.wkv7 import wkv7, wkv7_step
from radlads.model.mixer import MixerState


def run_wkv7(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    kk_BTHK: Tensor,
    iclr_BTHK: Tensor,
    *,
    state: MixerState | None,
    keep_BT: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """The RWKV-7 recurrence with its removal key: `(out [B,T,H,V], state [B,H,K,V] fp32 or None)`.

    One token on a kept state is a decode step (the state is updated in place); everything else is one parallel pass.
    """
    if keep_BT is not None:
        keep = keep_BT[..., None, None].to(k_BTHK.dtype)
        log_decay_BTHK, k_BTHK, kk_BTHK = log_decay_BTHK * keep, k_BTHK * keep, kk_BTHK * keep
    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, -kk_BTHK, kk_BTHK * iclr_BTHK)
    B, T = r_BTHK.shape[:2]
    if cu_seqlens is not None:
        if state is not None or output_state:
            raise ValueError("packed documents (cu_seqlens) and a recurrent state exclude each other")
        out, _ = wkv7(*(x.reshape(1, B * T, *x.shape[2:]) for x in inputs), cu_seqlens=cu_seqlens)
        return out.view_as(v_BTHV), None
    if T == 1 and state is not None and not training:
        wkv = state.wkv
        return wkv7_step(*(x[:, 0] for x in inputs), wkv).unsqueeze(1), wkv
    return wkv7(*inputs, initial_state=None if state is None else state.wkv, output_final_state=output_state)
