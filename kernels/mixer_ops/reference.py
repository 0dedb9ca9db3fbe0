"""The operators of mixer_ops as equations, computed in fp32 (fp64 of fp64) and rounded once.

Dims: B batch, T time, H query heads, G kv heads, K key and value dim per head, A = H·K, M = A or G·K.

`wkv7_operands`, the operands of wkv7, all six but r:

    v = v + (v_first - v) ⊙ σ(v0 + v_low)           where first values are given: at kv width before the repeat, or at
                                                    full width after it; likewise k with k_first, k0, k_low (kv width)
    k, v = repeat(k), repeat(v)                     kv head g serves H/G query heads in a row
    v = v + value_scale · v_low                     added values, instead of first ones
    speed = w0 + w_low                              log_decay = -e^(-decay_offset) σ(speed)
    iclr = σ(a0 + a_low)
    kk = k / ‖k‖,  a = -kk,  b = kk ⊙ iclr          stock keys: k ⊙ k_k in k's place
    k = k ⊙ (1 - e^log_decay + iclr)                or, log_log: k ⊙ (1 - (log σ(speed) - decay_offset) + iclr)
                                                    or, stock keys: k ⊙ (1 + (iclr - 1) ⊙ k_a)

`wkv7_finish`, from the output of wkv7 to the input of o_proj:

    y = s · GroupNorm_H(y)                          norm and scale where a design has them
    y = y + (Σ_K r ⊙ k ⊙ r_k) v                     bonus
    y = y ⊙ (gate_base + gate) ⊙ σ(out_gate)        [A]

`rotate_heads`, rotary positions, for the halves x0 and x1 of a head's first P channels:

    x0, x1 = x0 ⊙ cos0 - x1 ⊙ sin0,  x1 ⊙ cos1 + x0 ⊙ sin1

The Triton forms' backward passes recompute everything from the inputs, the only tensors that they keep
(rotate_heads: cos and sin).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from radlads.kernels.mixer_ops.plain import (
    AddedValues,
    Bonus,
    GroupNorm,
    Operands,
    Residual,
    StockKeys,
    rotate_heads_torch,
)


def wkv7_operands_reference(
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    w_low_BTA: Tensor,
    a_low_BTA: Tensor,
    w0_A: Tensor,
    a0_A: Tensor,
    *,
    values: Residual | AddedValues | None = None,
    keys: Residual | None = None,
    stock: StockKeys | None = None,
    decay_offset: float = 0.5,
    log_log: bool = False,
    decay_dtype: torch.dtype = torch.float32,
) -> Operands:
    """See `wkv7_operands`."""
    dtype, wide = k_BTGK.dtype, torch.promote_types(k_BTGK.dtype, torch.float32)
    repeats = w_low_BTA.shape[-1] // k_BTGK.shape[2:].numel()
    k, v = (_mix(x.to(wide), by, repeats) for x, by in ((k_BTGK, keys), (v_BTGK, values)))
    speed = (w0_A.to(wide) + w_low_BTA.to(wide)).view_as(k)
    iclr = torch.sigmoid(a0_A.to(wide) + a_low_BTA.to(wide)).view_as(k)
    log_decay = -math.exp(-decay_offset) * torch.sigmoid(speed)
    unit = k
    if stock is not None:
        k_k, k_a = (x.to(wide).view(k.shape[2:]) for x in stock)
        unit, scale = k * k_k, 1 + (iclr - 1) * k_a
    elif log_log:
        scale = 1 - (nn.functional.logsigmoid(speed) - decay_offset) + iclr
    else:
        scale = iclr - torch.expm1(log_decay)
    kk = nn.functional.normalize(unit, dim=-1)
    rounded = (x.to(dtype) for x in (k * scale, v, -kk, kk * iclr))
    return Operands(log_decay.to(decay_dtype if wide == torch.float32 else wide), *rounded)


def _mix(x_BTGK: Tensor, by: Residual | AddedValues | None, repeats: int) -> Tensor:
    """[B,T,G,K] -> [B,T,H,K], mixed before the repeat or after it."""
    if by is None:
        return x_BTGK.repeat_interleave(repeats, dim=2)
    if isinstance(by, AddedValues):
        repeated = x_BTGK.repeat_interleave(repeats, dim=2)
        return repeated + by.scale * by.low.to(x_BTGK.dtype).view_as(repeated)
    first = by.first.to(x_BTGK.dtype)
    share = torch.sigmoid(by.offset.to(x_BTGK.dtype) + by.low.to(x_BTGK.dtype)).view_as(first)
    if first.shape[2] == x_BTGK.shape[2]:
        return (x_BTGK + (first - x_BTGK) * share).repeat_interleave(repeats, dim=2)
    x_BTGK = x_BTGK.repeat_interleave(repeats, dim=2)
    return x_BTGK + (first - x_BTGK) * share


def wkv7_finish_reference(
    y_BTHK: Tensor,
    *,
    norm: GroupNorm | None = None,
    scale: float = 1.0,
    bonus: Bonus | None = None,
    gate_BTA: Tensor | None = None,
    gate_base: float = 0.0,
    out_gate_BTA: Tensor | None = None,
) -> Tensor:
    """See `wkv7_finish`."""
    wide = torch.promote_types(y_BTHK.dtype, torch.float32)
    y = y_BTHK.to(wide)
    if norm is not None:
        weight, bias = (x.to(wide).view(y.shape[2:]) for x in norm[:2])
        y = nn.functional.layer_norm(y, y.shape[-1:], eps=norm.eps) * weight + bias
    y = y * scale
    if bonus is not None:
        r, k, v, r_k = (x.to(wide) for x in bonus)
        y = y + (r * k * r_k).sum(-1, keepdim=True) * v
    y = y.flatten(-2)
    if gate_BTA is not None:
        y = y * (gate_base + gate_BTA.to(wide))
    if out_gate_BTA is not None:
        y = y * torch.sigmoid(out_gate_BTA.to(wide))
    return y.to(y_BTHK.dtype)


def rotate_heads_reference(x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """See `rotate_heads`."""
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    return rotate_heads_torch(*(x.to(wide) for x in (x_BTHK, cos_BTP, sin_BTP))).to(x_BTHK.dtype)
