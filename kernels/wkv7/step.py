"""One token of the RWKV-7 recurrence on a state that is updated in place (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def wkv7_step_torch(
    r_BHK: Tensor,
    log_decay_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    a_BHK: Tensor,
    b_BHK: Tensor,
    state_BHKV: Tensor,
) -> Tensor:
    """Advance `state_BHKV` (fp32 or fp64, any strides) by one token in place; returns the output [B,H,V] in v's dtype.

    For inference: nothing here is differentiable. No host synchronisation, fixed shapes, so a graph can capture it.
    """
    r, w, k, v, a, b = (x.to(state_BHKV.dtype) for x in (r_BHK, log_decay_BHK, k_BHK, v_BHV, a_BHK, b_BHK))
    with torch.autocast(state_BHKV.device.type, enabled=False):
        read = a.unsqueeze(-2) @ state_BHKV
        state_BHKV.mul_(w.exp().unsqueeze(-1)).addcmul_(b.unsqueeze(-1), read)
        state_BHKV.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
        return (r.unsqueeze(-2) @ state_BHKV).squeeze(-2).to(v_BHV.dtype)


def wkv7_delta_step_torch(
    r_BHK: Tensor,
    log_decay_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    kk_BHK: Tensor,
    iclr_BHK: Tensor,
    state_BHKV: Tensor,
) -> Tensor:
    """As `wkv7_step_torch` with a = -kk and b = kk ⊙ iclr, formed in the state's dtype."""
    kk = kk_BHK.to(state_BHKV.dtype)
    return wkv7_step_torch(r_BHK, log_decay_BHK, k_BHK, v_BHV, -kk, kk * iclr_BHK.to(kk.dtype), state_BHKV)
