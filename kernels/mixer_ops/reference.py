"""The operands of wkv7 in torch: from projected keys, values and low-rank terms, all six but r.

Dims: B batch, T time, H query heads, G kv heads, K key and value dim per head, A = H·K, M = A or G·K.

    v = v + (v_first - v) ⊙ σ(v0 + v_low)           where first values are given: at kv width before the repeat, or at
                                                    full width after it; likewise k with k_first, k0, k_low (kv width)
    k, v = repeat(k), repeat(v)                     kv head g serves H/G query heads in a row
    speed = w0 + w_low                              log_decay = -e^(-decay_offset) σ(speed)
    iclr = σ(a0 + a_low)
    kk = k / ‖k‖,  a = -kk,  b = kk ⊙ iclr
    k = k ⊙ (1 - e^log_decay + iclr)                or, log_log: k ⊙ (1 - (log σ(speed) - decay_offset) + iclr)

The backward pass recomputes everything from the inputs, the only tensors kept: in bf16 about three times A and
the tensors at kv width. In addition to its outputs, the same code in torch keeps 14 times A numbers of 16 bits, eight
of them as fp32 (four tensors).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Operands(NamedTuple):
    """All [B,T,H,K]; log_decay in `decay_dtype`, the others in k's dtype."""

    log_decay: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class Residual(NamedTuple):
    """A residual to the first layer's values or keys."""

    first: Tensor
    """[B,T,G,K], or of values [B,T,H,K]: mixed after the repeat."""
    low: Tensor
    """[B,T,M], M the width of `first`."""
    offset: Tensor
    """[M]."""


def wkv7_operands_reference(
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    w_low_BTA: Tensor,
    a_low_BTA: Tensor,
    w0_A: Tensor,
    a0_A: Tensor,
    *,
    values: Residual | None = None,
    keys: Residual | None = None,
    decay_offset: float = 0.5,
    log_log: bool = False,
    decay_dtype: torch.dtype = torch.float32,
) -> Operands:
    """As `wkv7_operands`, in torch, computed in fp32 (fp64 of fp64) and rounded once."""
    dtype, wide = k_BTGK.dtype, torch.promote_types(k_BTGK.dtype, torch.float32)
    repeats = w_low_BTA.shape[-1] // k_BTGK.shape[2:].numel()
    k, v = (_mix(x.to(wide), residual, repeats) for x, residual in ((k_BTGK, keys), (v_BTGK, values)))
    speed = (w0_A.to(wide) + w_low_BTA.to(wide)).view_as(k)
    iclr = torch.sigmoid(a0_A.to(wide) + a_low_BTA.to(wide)).view_as(k)
    log_decay = -math.exp(-decay_offset) * torch.sigmoid(speed)
    kk = nn.functional.normalize(k, dim=-1)
    if log_log:
        scale = 1 - (nn.functional.logsigmoid(speed) - decay_offset) + iclr
    else:
        scale = iclr - torch.expm1(log_decay)
    rounded = (x.to(dtype) for x in (k * scale, v, -kk, kk * iclr))
    return Operands(log_decay.to(decay_dtype if wide == torch.float32 else wide), *rounded)


def _mix(x_BTGK: Tensor, residual: Residual | None, repeats: int) -> Tensor:
    """[B,T,G,K] -> [B,T,H,K], the residual before the repeat or after it."""
    if residual is None:
        return x_BTGK.repeat_interleave(repeats, dim=2)
    first = residual.first.to(x_BTGK.dtype)
    share = torch.sigmoid(residual.offset.to(x_BTGK.dtype) + residual.low.to(x_BTGK.dtype)).view_as(first)
    if first.shape[2] == x_BTGK.shape[2]:
        return (x_BTGK + (first - x_BTGK) * share).repeat_interleave(repeats, dim=2)
    x_BTGK = x_BTGK.repeat_interleave(repeats, dim=2)
    return x_BTGK + (first - x_BTGK) * share
