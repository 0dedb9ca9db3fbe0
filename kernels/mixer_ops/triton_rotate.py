"""The Triton form of rotate_heads: one program per block of rows, a row being a head of a token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.mixer_ops.triton_operands import _load, _store
from radlads.kernels.shared.triton_launch import cdiv, on_device_of, power_of_two

_ELEMENTS = 2048  # of a tile, both halves together
_LENGTHS = ("N", "H", "T", "APART")


@triton.jit(do_not_specialize=_LENGTHS)
def rotate_kernel(
    x, cos, sin, out, N, H, T, APART,
    K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """N rows [K], of which the first P channels turn, half against half. APART: T·P where every sequence has angles of
    its own, else 0. BACK: the transposed map, of gradients. Grid: blocks of BN rows."""
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    c = tl.arange(0, BP)
    inside = (row < N)[:, None] & (c < P // 2)[None, :]
    token = row // H
    low = row[:, None] * K + c[None, :]
    angle = ((token // T) * APART + (token % T) * P)[:, None] + c[None, :]
    high, other = low + P // 2, angle + P // 2
    x0, x1 = _load(x, low, inside), _load(x, high, inside)
    cos0, cos1 = _load(cos, angle, inside), _load(cos, other, inside)
    sin0, sin1 = _load(sin, angle, inside), _load(sin, other, inside)
    if BACK:
        _store(out, low, x0 * cos0 + x1 * sin1, inside)
        _store(out, high, x1 * cos1 - x0 * sin0, inside)
    else:
        _store(out, low, x0 * cos0 - x1 * sin0, inside)
        _store(out, high, x1 * cos1 + x0 * sin1, inside)
    if REST > 0:
        rest = tl.arange(0, REST)
        passed = (row < N)[:, None] & (rest < K - P)[None, :]
        at = row[:, None] * K + P + rest[None, :]
        _store(out, at, _load(x, at, passed), passed)


def _launch(x_BTHK: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    B, T, H, K = x_BTHK.shape
    P, rows = cos.shape[-1], B * T * H
    out = torch.empty_like(x_BTHK)
    meta: dict[str, Any] = {"K": K, "P": P, "BP": power_of_two(max(1, P // 2))}
    meta |= {"BN": max(1, min(64, _ELEMENTS // (2 * meta["BP"]))), "BACK": back}
    meta["REST"] = power_of_two(K - P) if K > P else 0
    if rows:
        apart = T * P if cos.shape[0] > 1 else 0
        with on_device_of(x_BTHK):
            rotate_kernel[(cdiv(rows, meta["BN"]),)](x_BTHK, cos, sin, out, rows, H, T, apart, **meta)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _launch(x.contiguous(), cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _launch(dout.contiguous(), *ctx.saved_tensors, back=True), None, None


def rotate_heads_triton(x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """As `rotate_heads`, for checked shapes on a GPU (or in Triton's interpreter)."""
    if not torch.is_grad_enabled():
        return _launch(x_BTHK.contiguous(), cos_BTP.contiguous(), sin_BTP.contiguous(), back=False)
    return _Rotate.apply(x_BTHK, cos_BTP, sin_BTP)
