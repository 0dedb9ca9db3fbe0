"""One token of the gated delta rule on a state that is updated in place (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gated_delta_step_torch(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor, beta_BH: Tensor, state_BHKV: Tensor
) -> Tensor:
    """Advance `state_BHKV` (fp32 or fp64, any strides) by one token in place; returns the output [B,H,V] in v's dtype.

    For inference: nothing here is differentiable. No host synchronisation, fixed shapes, so a graph can capture it.
    """
    q, k, v, log_decay, beta = (x.to(state_BHKV.dtype) for x in (q_BHK, k_BHK, v_BHV, log_decay_BH, beta_BH))
    with torch.autocast(state_BHKV.device.type, enabled=False):
        state_BHKV.mul_(log_decay.exp()[..., None, None])
        change = (v.unsqueeze(-2) - k.unsqueeze(-2) @ state_BHKV) * beta[..., None, None]
        state_BHKV.addcmul_(k.unsqueeze(-1), change)
        return (q.unsqueeze(-2) @ state_BHKV).squeeze(-2).to(v_BHV.dtype)
