"""One token of the RAD-RWKV6 recurrence on a state that is updated in place (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def wkv6_step_torch(r_BHK: Tensor, log_decay_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, state_BHKV: Tensor) -> Tensor:
    """Advance `state_BHKV` (fp32 or fp64, any strides) by one token in place; returns the output [B,H,V] in v's dtype.

    For inference: nothing here is differentiable. No host synchronisation, fixed shapes, so a graph can capture it.
    """
    r, w, k, v = (x.to(state_BHKV.dtype) for x in (r_BHK, log_decay_BHK, k_BHK, v_BHV))
    with torch.autocast(state_BHKV.device.type, enabled=False):
        state_BHKV.mul_(w.exp().unsqueeze(-1)).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
        return (r.unsqueeze(-2) @ state_BHKV).squeeze(-2).to(v_BHV.dtype)
