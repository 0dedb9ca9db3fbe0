"""The operators of mixer_ops in plain torch, rounded step by step as the mixers always were; exports carry this file.

Dims: B batch, T time, H query heads, G kv heads, K key and value dim per head, A = H·K, M = A or G·K. reference.py has
the equations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Operands(NamedTuple):
    """Inputs of wkv7 but r. All [B,T,H,K]; log_decay in `decay_dtype`, the others in k's dtype."""

    log_decay: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class DeltaOperands(NamedTuple):
    """Inputs of wkv7_delta_step but r, as `Operands`: a = -kk, b = kk ⊙ iclr."""

    log_decay: Tensor
    k: Tensor
    v: Tensor
    kk: Tensor
    iclr: Tensor


class Residual(NamedTuple):
    """A residual to the first layer's values or keys."""

    first: Tensor
    """[B,T,G,K], or of values [B,T,H,K]: mixed after the repeat."""
    low: Tensor
    """[B,T,M], M the width of `first`."""
    offset: Tensor
    """[M] or [1,1,M]."""


class AddedValues(NamedTuple):
    """Low-rank values, added after the repeat."""

    low: Tensor
    """[B,T,A]."""
    scale: float


class StockKeys(NamedTuple):
    """Vectors [A] or [1,1,A] of RWKV-7's own keys."""

    k_k: Tensor
    k_a: Tensor


class GroupNorm(NamedTuple):
    """A norm over each head of a token. weight, bias: [A]."""

    weight: Tensor
    bias: Tensor
    eps: float


class Bonus(NamedTuple):
    """What (Σ_K r ⊙ k ⊙ r_k) v consists of: [B,T,H,K] each, and r_k [H,K]."""

    r: Tensor
    k: Tensor
    v: Tensor
    r_k: Tensor


def wkv7_operands_torch(
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
    made = wkv7_delta_operands_torch(
        k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, w0_A, a0_A,
        values=values, keys=keys, stock=stock, decay_offset=decay_offset, log_log=log_log, decay_dtype=decay_dtype,
    )  # fmt: skip
    return Operands(*made[:3], -made.kk, made.kk * made.iclr)


def wkv7_delta_operands_torch(
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
) -> DeltaOperands:
    """As `wkv7_operands`, for wkv7_delta_step."""
    repeats = w_low_BTA.shape[-1] // k_BTGK.shape[2:].numel()
    k, v = _mix(k_BTGK, keys, repeats), _mix(v_BTGK, values, repeats)
    iclr = torch.sigmoid((a0_A + a_low_BTA).float()).view_as(k)
    speed = (w0_A.float() + w_low_BTA.float()).view_as(k)
    log_decay = -math.exp(-decay_offset) * torch.sigmoid(speed)
    unit = k
    if stock is not None:
        k_k, k_a = (x.view(k.shape[2:]) for x in stock)
        unit, scale = k * k_k, 1 + (iclr - 1) * k_a
    elif log_log:
        scale = 1 - (nn.functional.logsigmoid(speed) - decay_offset) + iclr
    else:
        scale = iclr - torch.expm1(log_decay)
    kk = nn.functional.normalize(unit.float(), dim=-1).to(k.dtype)
    return DeltaOperands(log_decay.to(decay_dtype), k * scale.to(k.dtype), v, kk, iclr.to(k.dtype))


def _mix(x_BTGK: Tensor, by: Residual | AddedValues | None, repeats: int) -> Tensor:
    """[B,T,G,K] -> [B,T,H,K], mixed before the repeat or after it."""
    after = isinstance(by, AddedValues) or (by is not None and by.first.shape[2] != x_BTGK.shape[2])
    x = _repeat(x_BTGK, repeats) if after else x_BTGK
    if isinstance(by, AddedValues):
        x = x + by.scale * by.low.view_as(x)
    elif by is not None:
        x = x + (by.first - x) * torch.sigmoid(by.offset + by.low).view_as(x)
    return x if after else _repeat(x, repeats)


def _repeat(x_BTGK: Tensor, repeats: int) -> Tensor:
    return x_BTGK if repeats == 1 else x_BTGK.repeat_interleave(repeats, dim=2)


def wkv7_finish_torch(
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
    y = y_BTHK
    if norm is not None:
        wide = nn.functional.layer_norm(y.float(), y.shape[-1:], eps=norm.eps).flatten(-2)
        y = (wide * norm.weight.float() + norm.bias.float()).to(y.dtype).view_as(y)
    if scale != 1:
        y = y * scale
    if bonus is not None:
        y = y + (bonus.r * bonus.k * bonus.r_k).sum(-1, keepdim=True) * bonus.v
    y = y.flatten(-2)
    if gate_BTA is not None:
        y = y * (gate_base + gate_BTA if gate_base else gate_BTA)
    return y if out_gate_BTA is None else y * torch.sigmoid(out_gate_BTA)


def rotate_heads_torch(x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """See `rotate_heads`."""
    P = cos_BTP.shape[-1]
    turned, passed = x_BTHK[..., :P], x_BTHK[..., P:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos_BTP.unsqueeze(2) + torch.cat((-high, low), dim=-1) * sin_BTP.unsqueeze(2)
    return turned if passed.shape[-1] == 0 else torch.cat((turned, passed), dim=-1)
