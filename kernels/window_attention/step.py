"""One token of windowed softmax attention, on a state that is updated in place (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def window_attention_step_torch(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    memory_BGSC: Tensor,
    seen_B: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    keep_B: Tensor | None = None,
) -> Tensor:
    """Advance memory [B,G,S+W,K+V] and seen [B] by one token in place; returns the output [B,H,V] in v's dtype. Where
    keep is false, neither changes and the output has no meaning.

    For inference: nothing here is differentiable. No host synchronisation, fixed shapes, so a graph can capture it.
    """
    slot = torch.where(seen_B < sinks, seen_B, sinks + (seen_B - sinks) % window)
    token = torch.cat([k_BGK, v_BGV], -1).to(memory_BGSC.dtype)[:, :, None]
    place = slot[:, None, None, None].expand_as(token)
    if keep_B is not None:
        token = torch.where(keep_B[:, None, None, None], token, memory_BGSC.gather(2, place))
    memory_BGSC.scatter_(2, place, token)
    seen_B += 1 if keep_B is None else keep_B
    slots = torch.arange(sinks + window, device=seen_B.device)
    filled = (slots < seen_B[:, None].clamp(min=1))[:, None, None]  # a row of padding alone sees a slot of zeros
    K, G = k_BGK.shape[-1], k_BGK.shape[1]
    dtype = torch.float64 if memory_BGSC.dtype == torch.float64 else torch.float32
    with torch.autocast(memory_BGSC.device.type, enabled=False):
        held = memory_BGSC.to(dtype)
        scores = (q_BHK.to(dtype).unflatten(1, (G, -1)) @ held[..., :K].mT) * scale
        weights = scores.masked_fill(~filled, -torch.inf).softmax(-1)
        return (weights @ held[..., K:]).flatten(1, 2).to(v_BGV.dtype)
