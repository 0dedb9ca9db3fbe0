"""The RWKV-7 recurrence as mixers call it: with a removal key and padding. An exported model carries this file."""

from __future__ import annotations

from torch import Tensor

from radlads.kernels.wkv7 import wkv7, wkv7_delta_step
from radlads.model.mixers.shared.mixer import MixerState
from radlads.model.mixers.shared.recurrence import run_recurrence


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
    """`(out [B,T,H,V], state [B,H,K,V] fp32 or None)`; see `run_recurrence`. Padding neither decays nor writes."""
    if keep_BT is not None:
        keep = keep_BT[..., None, None].to(k_BTHK.dtype)
        log_decay_BTHK, k_BTHK, kk_BTHK = log_decay_BTHK * keep, k_BTHK * keep, kk_BTHK * keep
    return run_recurrence(
        _wkv7,
        wkv7_delta_step,
        (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, kk_BTHK, iclr_BTHK),
        state=state,
        cu_seqlens=cu_seqlens,
        output_state=output_state,
        training=training,
    )


def _wkv7(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, kk: Tensor, iclr: Tensor, **options: Tensor | bool | None
) -> tuple[Tensor, Tensor | None]:
    return wkv7(r, log_decay, k, v, -kk, kk * iclr, **options)
