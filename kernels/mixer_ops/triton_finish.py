"""The Triton form of wkv7_finish: one program per block of tokens and head. Gradients of the vectors (norm, r_k) leave
each program as a sum over its tokens; torch adds those up, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.mixer_ops.plain import Bonus, GroupNorm
from radlads.kernels.mixer_ops.triton_operands import _load, _store, tile_of
from radlads.kernels.shared.triton_launch import cdiv, on_device_of

_LENGTHS = ("N", "H")


@triton.jit
def _place(H, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, N):
    """(block, place in vectors, which of its channels exist, place in tensors, what of it exists)."""
    row = tl.program_id(0).to(tl.int64)
    token = row * BT + tl.arange(0, BT)
    c = tl.arange(0, BK)
    vector = tl.program_id(1) * K + c
    known = c < K
    return row, vector, known, token[:, None] * (H * K) + vector[None, :], (token < N)[:, None] & known[None, :]


@triton.jit
def _normed(y, known, EPSILON, K: tl.constexpr):
    """(y - mean) / deviation over the K channels that exist, and 1 / deviation."""
    centred = tl.where(known[None, :], y - (tl.sum(y, 1) / K)[:, None], 0.0)
    over = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / K + EPSILON)
    return centred * over[:, None], over


@triton.jit(do_not_specialize=_LENGTHS)
def finish_kernel(
    y, weight, bias, r, k, v, r_k, gate, out_gate, out, N, H, SCALE, BASE, EPSILON,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, BONUS: tl.constexpr, GATE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of BT tokens, H)."""
    _row, vector, known, at, inside = _place(H, K, BT, BK, N)
    value = _load(y, at, inside)
    if NORM:
        normed, _over = _normed(value, known, EPSILON, K)
        value = normed * _load(weight, vector, known)[None, :] + _load(bias, vector, known)[None, :]
    value *= SCALE
    if BONUS:
        product = _load(r, at, inside) * _load(k, at, inside) * _load(r_k, vector, known)[None, :]
        value += tl.sum(product, 1)[:, None] * _load(v, at, inside)
    if GATE:
        value *= BASE + _load(gate, at, inside)
    if OUT:
        value *= tl.sigmoid(_load(out_gate, at, inside))
    _store(out, at, value, inside)


@triton.jit(do_not_specialize=_LENGTHS)
def finish_backward_kernel(
    y, weight, bias, r, k, v, r_k, gate, out_gate, dout,
    dy, dweight, dbias, dr, dk, dv, dr_k, dgate, dout_gate, N, H, SCALE, BASE, EPSILON,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, BONUS: tl.constexpr, GATE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Grid as of finish_kernel. Gradients of vectors: [blocks, A] fp32, sums over a block's tokens."""
    row, vector, known, at, inside = _place(H, K, BT, BK, N)
    value, over = _load(y, at, inside), 0.0
    if NORM:
        normed, over = _normed(value, known, EPSILON, K)
        gain = _load(weight, vector, known)[None, :]
        value = normed * gain + _load(bias, vector, known)[None, :]
    value *= SCALE
    if BONUS:
        read, key, written = _load(r, at, inside), _load(k, at, inside), _load(v, at, inside)
        share = _load(r_k, vector, known)[None, :]
        amount = tl.sum(read * key * share, 1)[:, None]
        value += amount * written
    dvalue = _load(dout, at, inside)
    factor = tl.full((1, 1), 1.0, tl.float32)
    if GATE:
        factor = BASE + _load(gate, at, inside)
    if OUT:
        opened = tl.sigmoid(_load(out_gate, at, inside))
        _store(dout_gate, at, dvalue * value * factor * opened * (1.0 - opened), inside)
        dvalue *= opened
    if GATE:
        _store(dgate, at, dvalue * value, inside)
        dvalue *= factor
    if BONUS:
        damount = tl.sum(dvalue * written, 1)[:, None]
        _store(dv, at, dvalue * amount, inside)
        _store(dr, at, damount * key * share, inside)
        _store(dk, at, damount * read * share, inside)
        _store(dr_k, row * (H * K) + vector, tl.sum(damount * read * key, 0), known)
    dvalue *= SCALE
    if NORM:
        _store(dweight, row * (H * K) + vector, tl.sum(dvalue * normed, 0), known)
        _store(dbias, row * (H * K) + vector, tl.sum(dvalue, 0), known)
        dnormed = dvalue * gain
        along = tl.sum(dnormed * normed, 1) / K
        dvalue = (dnormed - (tl.sum(dnormed, 1) / K)[:, None] - normed * along[:, None]) * over[:, None]
    _store(dy, at, dvalue, inside)


def _run(options: dict[str, Any], inputs: tuple[Tensor | None, ...]) -> Tensor:
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    y = inputs[0]
    out = y.new_empty(*y.shape[:2], y.shape[2] * y.shape[3])
    _launch(finish_kernel, y, options, *(y if x is None else x for x in inputs), out)
    return out


class _Finish(torch.autograd.Function):
    """(options, nine inputs; those that are absent are None)."""

    @staticmethod
    def forward(ctx: FunctionCtx, options: dict[str, Any], *inputs: Tensor | None) -> Tensor:
        inputs = tuple(None if x is None else x.contiguous() for x in inputs)
        out = _run(options, inputs)
        ctx.save_for_backward(*(x for x in inputs if x is not None))
        ctx.given, ctx.options = [x is not None for x in inputs], options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if given else None for given in ctx.given]
        y = inputs[0]
        blocks = cdiv(y.shape[0] * y.shape[1], ctx.options["meta"]["BT"])
        grads: list[Tensor | None] = [None if x is None else torch.empty_like(x) for x in inputs]
        for place in _VECTORS:
            if grads[place] is not None:
                grads[place] = torch.empty(blocks, grads[place].numel(), dtype=torch.float32, device=y.device)
        with on_device_of(y):
            _launch(
                finish_backward_kernel, y, ctx.options,
                *(y if x is None else x for x in (*inputs, dout.contiguous(), *grads)),
            )  # fmt: skip
        for place in _VECTORS:
            if grads[place] is not None:
                grads[place] = grads[place].sum(0).view_as(inputs[place]).to(inputs[place].dtype)
        return None, *grads


_VECTORS = (1, 2, 6)  # places of weight, bias and r_k among the inputs


def _launch(kernel: Any, y: Tensor, options: dict[str, Any], *tensors: Tensor) -> None:
    B, T, H, _ = y.shape
    if B * T:
        grid = cdiv(B * T, options["meta"]["BT"]), H
        kernel[grid](*tensors, B * T, H, *options["scalars"], **options["meta"], num_warps=4)


def wkv7_finish_triton(
    y_BTHK: Tensor,
    *,
    norm: GroupNorm | None = None,
    scale: float = 1.0,
    bonus: Bonus | None = None,
    gate_BTA: Tensor | None = None,
    gate_base: float = 0.0,
    out_gate_BTA: Tensor | None = None,
) -> Tensor:
    """As `wkv7_finish`, for checked shapes on a GPU (or in Triton's interpreter)."""
    meta = tile_of(y_BTHK.shape[-1]) | {"NORM": norm is not None, "BONUS": bonus is not None}
    meta |= {"GATE": gate_BTA is not None, "OUT": out_gate_BTA is not None}
    options = {"meta": meta, "scalars": (scale, gate_base, norm.eps if norm else 0.0)}
    vectors = (None, None) if norm is None else norm[:2]
    inputs = (y_BTHK, *vectors, *(bonus or (None,) * 4), gate_BTA, out_gate_BTA)
    with on_device_of(y_BTHK):
        return _Finish.apply(options, *inputs) if torch.is_grad_enabled() else _run(options, inputs)
