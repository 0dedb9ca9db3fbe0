"""The Triton form of wkv7_operands: one program per block of tokens and kv head, with all query heads of that kv head.

Keys and values are read once for all their heads, and their gradients are summed over the heads in registers. Gradients
of the vectors (w0, a0, v0, k0, k_k, k_a) leave each program as a sum over its tokens; torch adds those up, in a fixed
order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.mixer_ops.plain import AddedValues, Operands, Residual, StockKeys
from radlads.kernels.shared.triton_launch import cdiv, on_device_of, power_of_two

EPS = tl.constexpr(1e-12)  # of torch's normalize
NONE, KV, HEADS, ADDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # how values are mixed
DECAY, LOG_LOG, STOCK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how keys are scaled
_ELEMENTS = 2048  # of a tile; a program of four warps then holds sixteen numbers a thread
_LENGTHS = ("N",)


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, value, mask):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _share(low, offset, at, vector, inside, known):
    """σ(offset + low): the share of the first layer's value."""
    return tl.sigmoid(_load(offset, vector, known)[None, :] + _load(low, at, inside))


@triton.jit
def _terms(w_low, a_low, w0, a0, k_a, at, vector, inside, known, SCALE, OFFSET, SCALING: tl.constexpr):
    """(σ(speed), log decay, iclr, key scale) of a head."""
    speed = _load(w0, vector, known)[None, :] + _load(w_low, at, inside)
    rate = tl.sigmoid(speed)
    log_decay = -SCALE * rate
    iclr = tl.sigmoid(_load(a0, vector, known)[None, :] + _load(a_low, at, inside))
    if SCALING == LOG_LOG:
        softplus = tl.maximum(-speed, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(speed)))  # -log σ(speed)
        scale = 1.0 + softplus + OFFSET + iclr
    elif SCALING == STOCK:
        scale = 1.0 + (iclr - 1.0) * _load(k_a, vector, known)[None, :]
    else:
        scale = 1.0 - tl.exp(log_decay) + iclr
    return rate, log_decay, iclr, scale


@triton.jit
def _unit(key):
    """(key / length, length) of every token."""
    length = tl.sqrt(tl.sum(key * key, 1))
    return key / tl.maximum(length, EPS)[:, None], length


@triton.jit
def _unit_back(dunit, unit, length):
    along = tl.where(length > EPS, tl.sum(dunit * unit, 1), 0.0)
    return (dunit - unit * along[:, None]) / tl.maximum(length, EPS)[:, None]


@triton.jit(do_not_specialize=_LENGTHS)
def operands_kernel(
    k, v, w_low, a_low, w0, a0, v_first, v_low, v0, k_first, k_low, k0, k_k, k_a,
    log_decay, k_out, v_out, a, b, N, SCALE, OFFSET, ADD,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    VALUES: tl.constexpr, KEYS: tl.constexpr, SCALING: tl.constexpr, DELTA: tl.constexpr = False,
):  # fmt: skip
    """Grid: (blocks of BT tokens, G). DELTA: a and b are the unit removal key and its learning rate."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    group, c = tl.program_id(1), tl.arange(0, BK)
    known = c < K
    inside = (token < N)[:, None] & known[None, :]
    vector = group * K + c
    at = token[:, None] * (G * K) + vector[None, :]
    key, value = _load(k, at, inside), _load(v, at, inside)
    if VALUES == KV:
        value += (_load(v_first, at, inside) - value) * _share(v_low, v0, at, vector, inside, known)
    if KEYS == KV:
        key += (_load(k_first, at, inside) - key) * _share(k_low, k0, at, vector, inside, known)
    unit, _length = _unit(key)
    for head in range(R):
        vector = (group * R + head) * K + c
        at = token[:, None] * (G * R * K) + vector[None, :]
        _rate, decay, iclr, scale = _terms(w_low, a_low, w0, a0, k_a, at, vector, inside, known, SCALE, OFFSET, SCALING)
        mixed = value
        if VALUES == HEADS:
            mixed += (_load(v_first, at, inside) - value) * _share(v_low, v0, at, vector, inside, known)
        elif VALUES == ADDED:
            mixed += ADD * _load(v_low, at, inside)
        if SCALING == STOCK:
            unit, _length = _unit(key * _load(k_k, vector, known)[None, :])
        _store(log_decay, at, decay, inside)
        _store(k_out, at, key * scale, inside)
        _store(v_out, at, mixed, inside)
        if DELTA:
            _store(a, at, unit, inside)
            _store(b, at, iclr, inside)
        else:
            _store(a, at, -unit, inside)
            _store(b, at, unit * iclr, inside)


@triton.jit
def _mix_back(x, dmixed, first, low, offset, dfirst, dlow, doffset, at, vector, inside, known, row, WIDTH):
    """Through x + (first - x) ⊙ share: stores the residual's gradients, returns x's."""
    share = _share(low, offset, at, vector, inside, known)
    dpre = dmixed * (_load(first, at, inside) - x) * share * (1.0 - share)
    _store(dfirst, at, dmixed * share, inside)
    _store(dlow, at, dpre, inside)
    _store(doffset, row * WIDTH + vector, tl.sum(dpre, 0), known)
    return dmixed * (1.0 - share)


@triton.jit(do_not_specialize=_LENGTHS)
def operands_backward_kernel(
    k, v, w_low, a_low, w0, a0, v_first, v_low, v0, k_first, k_low, k0, k_k, k_a,
    dlog_decay, dk_out, dv_out, da, db,
    dk, dv, dw_low, da_low, dw0, da0, dv_first, dv_low, dv0, dk_first, dk_low, dk0, dk_k, dk_a, N, SCALE, OFFSET, ADD,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    VALUES: tl.constexpr, KEYS: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """Grid as of operands_kernel. Gradients of vectors: [blocks, width] fp32, sums over a block's tokens."""
    row = tl.program_id(0).to(tl.int64)
    token = row * BT + tl.arange(0, BT)
    group, c = tl.program_id(1), tl.arange(0, BK)
    known = c < K
    inside = (token < N)[:, None] & known[None, :]
    vector_kv = group * K + c
    at_kv = token[:, None] * (G * K) + vector_kv[None, :]
    key_kv, value_kv = _load(k, at_kv, inside), _load(v, at_kv, inside)
    key, value = key_kv, value_kv
    if VALUES == KV:
        value += (_load(v_first, at_kv, inside) - value) * _share(v_low, v0, at_kv, vector_kv, inside, known)
    if KEYS == KV:
        key += (_load(k_first, at_kv, inside) - key) * _share(k_low, k0, at_kv, vector_kv, inside, known)
    unit, length = _unit(key)
    dunit, dkey, dvalue = tl.zeros_like(key), tl.zeros_like(key), tl.zeros_like(key)
    for head in range(R):
        vector = (group * R + head) * K + c
        at = token[:, None] * (G * R * K) + vector[None, :]
        rate, decay, iclr, scale = _terms(w_low, a_low, w0, a0, k_a, at, vector, inside, known, SCALE, OFFSET, SCALING)
        dk_here, db_here = _load(dk_out, at, inside), _load(db, at, inside)
        dscale = dk_here * key
        dkey += dk_here * scale
        dunit_here = db_here * iclr - _load(da, at, inside)
        ddecay = _load(dlog_decay, at, inside)
        if SCALING == STOCK:
            gain, share = _load(k_k, vector, known)[None, :], _load(k_a, vector, known)[None, :]
            unit, length = _unit(key * gain)
            draw = _unit_back(dunit_here, unit, length)
            dkey += draw * gain
            _store(dk_k, row * (G * R * K) + vector, tl.sum(draw * key, 0), known)
            _store(dk_a, row * (G * R * K) + vector, tl.sum(dscale * (iclr - 1.0), 0), known)
            dscale *= share
        else:
            dunit += dunit_here
        diclr = (db_here * unit + dscale) * iclr * (1.0 - iclr)
        if SCALING == LOG_LOG:
            dspeed = -SCALE * ddecay * rate * (1.0 - rate) - dscale * (1.0 - rate)
        elif SCALING == STOCK:
            dspeed = -SCALE * ddecay * rate * (1.0 - rate)
        else:
            dspeed = -SCALE * (ddecay - dscale * tl.exp(decay)) * rate * (1.0 - rate)
        _store(dw_low, at, dspeed, inside)
        _store(da_low, at, diclr, inside)
        _store(dw0, row * (G * R * K) + vector, tl.sum(dspeed, 0), known)
        _store(da0, row * (G * R * K) + vector, tl.sum(diclr, 0), known)
        dmixed = _load(dv_out, at, inside)
        if VALUES == HEADS:
            dmixed = _mix_back(
                value, dmixed, v_first, v_low, v0, dv_first, dv_low, dv0, at, vector, inside, known, row, G * R * K
            )
        elif VALUES == ADDED:
            _store(dv_low, at, ADD * dmixed, inside)
        dvalue += dmixed
    if SCALING != STOCK:
        dkey += _unit_back(dunit, unit, length)
    if VALUES == KV:
        dvalue = _mix_back(
            value_kv, dvalue, v_first, v_low, v0, dv_first, dv_low, dv0, at_kv, vector_kv, inside, known, row, G * K
        )
    if KEYS == KV:
        dkey = _mix_back(
            key_kv, dkey, k_first, k_low, k0, dk_first, dk_low, dk0, at_kv, vector_kv, inside, known, row, G * K
        )
    _store(dk, at_kv, dkey, inside)
    _store(dv, at_kv, dvalue, inside)


def _run(options: dict[str, Any], inputs: tuple[Tensor | None, ...], **more: Any) -> list[Tensor]:
    decay_dtype, scalars, meta = options["decay_dtype"], options["scalars"], options["meta"]
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)
    k = inputs[0]
    shape = (*k.shape[:2], meta["G"] * meta["R"], meta["K"])
    outs = [k.new_empty(shape, dtype=decay_dtype if place == 0 else k.dtype) for place in range(5)]
    tokens = k.shape[0] * k.shape[1]
    if tokens:
        operands_kernel[_grid(tokens, meta)](
            *(k if x is None else x for x in inputs), *outs, tokens, *scalars, **meta, **more, num_warps=4
        )
    return outs


class _Operands(torch.autograd.Function):
    """(options, fourteen inputs; those that are absent are None)."""

    @staticmethod
    def forward(ctx: FunctionCtx, options: dict[str, Any], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        inputs = tuple(None if x is None else x.contiguous() for x in inputs)
        outs = _run(options, inputs)
        ctx.save_for_backward(*(x for x in inputs if x is not None))
        ctx.given, ctx.options = [x is not None for x in inputs], options
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *douts: Tensor) -> tuple[Tensor | None, ...]:
        saved, meta = iter(ctx.saved_tensors), ctx.options["meta"]
        inputs = [next(saved) if given else None for given in ctx.given]
        k = inputs[0]
        tokens = k.shape[0] * k.shape[1]
        blocks = _grid(tokens, meta)[0]
        grads: list[Tensor | None] = []
        for place, x in enumerate(inputs):
            if x is None:
                grads.append(None)
            elif place in _VECTORS:
                grads.append(torch.empty(blocks, x.numel(), dtype=torch.float32, device=k.device))
            else:
                grads.append(torch.empty_like(x))
        if tokens:
            with on_device_of(k):
                operands_backward_kernel[_grid(tokens, meta)](
                    *(k if x is None else x for x in inputs), *(x.contiguous() for x in douts),
                    *(k if x is None else x for x in grads), tokens, *ctx.options["scalars"], **meta, num_warps=4,
                )  # fmt: skip
        for place in _VECTORS:
            if grads[place] is not None:
                grads[place] = grads[place].sum(0).view_as(inputs[place]).to(inputs[place].dtype)
        return None, *grads


_VECTORS = (4, 5, 8, 11, 12, 13)  # places of w0, a0, v0, k0, k_k, k_a among the inputs


def tile_of(K: int) -> dict[str, int]:
    """Sizes of a tile: BT tokens of a head."""
    BK = power_of_two(K)
    return {"K": K, "BK": BK, "BT": max(1, min(32, _ELEMENTS // BK))}


def _grid(tokens: int, meta: dict[str, Any]) -> tuple[int, int]:
    return cdiv(tokens, meta["BT"]), meta["G"]


def wkv7_operands_triton(
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
    delta: bool = False,
) -> Operands:
    """As `wkv7_operands`, for checked shapes on a GPU (or in Triton's interpreter). delta: as `wkv7_delta_operands`, in
    the places of a and b, without gradients."""
    G, K = k_BTGK.shape[2:]
    R = w_low_BTA.shape[-1] // (G * K)
    added, first, level = 0.0, (None,) * 3, 0
    if isinstance(values, AddedValues):
        added, first, level = values.scale, (None, values.low, None), 3
    elif values is not None:
        first, level = values, 1 if values.first.shape[2] == G else 2
    meta = {
        "G": G, "R": R, "VALUES": level, "KEYS": 0 if keys is None else 1,
        "SCALING": 2 if stock else 1 if log_log else 0, **tile_of(K),
    }  # fmt: skip
    scalars = (math.exp(-decay_offset), decay_offset, added)
    options = {"meta": meta, "scalars": scalars, "decay_dtype": decay_dtype}
    optional = (*first, *(keys or (None,) * 3), *(stock or (None,) * 2))
    inputs = (k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, w0_A, a0_A, *optional)
    with on_device_of(k_BTGK):
        if delta or not torch.is_grad_enabled():
            return Operands(*_run(options, inputs, DELTA=delta))
        outs = _Operands.apply(options, *inputs)
    return Operands(*outs)
