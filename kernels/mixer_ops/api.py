"""`wkv7_operands`, `wkv7_finish`, `rotate_heads`: what RWKV-7 mixers compute before and after the recurrence;
reference.py has the equations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from radlads.kernels.mixer_ops.meta import wkv7_finish_meta, wkv7_operands_meta
from radlads.kernels.mixer_ops.plain import (
    AddedValues,
    Bonus,
    DeltaOperands,
    GroupNorm,
    Operands,
    Residual,
    StockKeys,
    rotate_heads_torch,
    wkv7_delta_operands_torch,
    wkv7_finish_torch,
    wkv7_operands_torch,
)
from radlads.kernels.shared.backends import not_on_gpu, triton_installed
from radlads.kernels.shared.chosen import note_kernel

Form = Literal["torch", "triton"]


def wkv7_operands(
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
    backend: Form | None = None,
) -> Operands:
    """The operands of wkv7, from projected keys and values and low-rank terms. Gradients flow to every tensor.

    backend: None picks Triton on a GPU where it applies, else torch. Raises ValueError, in one line, for shapes that do
    not fit together, a residual of keys at full width, and a backend that is unknown or cannot run.
    """
    _check(k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, values, keys)
    inputs = (k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, w0_A, a0_A)
    options = {
        "values": values,
        "keys": keys,
        "stock": stock,
        "decay_offset": decay_offset,
        "log_log": log_log,
        "decay_dtype": decay_dtype,
    }
    form = _choose("wkv7_operands", backend, inputs[:4])
    if form == "triton":
        from radlads.kernels.mixer_ops.triton_operands import wkv7_operands_triton

        return wkv7_operands_triton(*inputs, **options)
    return (wkv7_operands_meta if form == "meta" else wkv7_operands_torch)(*inputs, **options)


def wkv7_delta_operands(
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
    backend: Form | None = None,
) -> DeltaOperands:
    """As `wkv7_operands`, with the unit removal key kk and its learning rate instead of a = -kk and b = kk ⊙ iclr: what
    wkv7_delta_step takes. Not differentiable in its Triton form, which runs where gradients are off."""
    _check(k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, values, keys)
    inputs = (k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, w0_A, a0_A)
    options = {
        "values": values, "keys": keys, "stock": stock,
        "decay_offset": decay_offset, "log_log": log_log, "decay_dtype": decay_dtype,
    }  # fmt: skip
    if not torch.is_grad_enabled() and _choose("wkv7_delta_operands", backend, inputs[:4]) == "triton":
        from radlads.kernels.mixer_ops.triton_operands import wkv7_operands_triton

        return DeltaOperands(*wkv7_operands_triton(*inputs, **options, delta=True))
    return wkv7_delta_operands_torch(*inputs, **options)


def wkv7_finish(
    y_BTHK: Tensor,
    *,
    norm: GroupNorm | None = None,
    scale: float = 1.0,
    bonus: Bonus | None = None,
    gate_BTA: Tensor | None = None,
    gate_base: float = 0.0,
    out_gate_BTA: Tensor | None = None,
    backend: Form | None = None,
) -> Tensor:
    """From the output of wkv7 to the input [B,T,A] of o_proj: norm, scale, bonus and gates, in this order. Gradients
    flow to every tensor.

    gate_BTA: a factor, to which gate_base is added. out_gate_BTA: the teacher's own gate, before its sigmoid. backend:
    None picks Triton on a GPU where it applies, else torch. Raises ValueError, in one line,
    for shapes that do not fit together and for a backend that is unknown or cannot run.
    """
    others = (*(bonus[:3] if bonus else ()), gate_BTA, out_gate_BTA)
    given = [x for x in others if x is not None]
    if y_BTHK.dim() != 4 or any(x.shape[:2] != y_BTHK.shape[:2] or x.numel() != y_BTHK.numel() for x in given):
        shapes = ", ".join(str(tuple(x.shape)) for x in (y_BTHK, *given))
        raise ValueError(f"wkv7_finish: y, r, k, v and gates do not fit together: {shapes}")
    options = {
        "norm": norm,
        "scale": scale,
        "bonus": bonus,
        "gate_BTA": gate_BTA,
        "gate_base": gate_base,
        "out_gate_BTA": out_gate_BTA,
    }
    form = _choose("wkv7_finish", backend, (y_BTHK, *given))
    if form == "triton":
        from radlads.kernels.mixer_ops.triton_finish import wkv7_finish_triton

        return wkv7_finish_triton(y_BTHK, **options)
    return (wkv7_finish_meta if form == "meta" else wkv7_finish_torch)(y_BTHK, **options)


def rotate_heads(x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, backend: Form | None = None) -> Tensor:
    """Rotary positions: of every head's first P channels one half turns against the other, the rest pass.

    cos_BTP, sin_BTP: [B or 1,T,P], P even; they get no gradient. backend: as of `wkv7_finish`. Raises ValueError, in
    one line, for shapes that do not fit together and for a backend that is unknown or cannot run.
    """
    B, T, _, K = x_BTHK.shape
    P = cos_BTP.shape[-1]
    if cos_BTP.shape not in ((B, T, P), (1, T, P)) or sin_BTP.shape != cos_BTP.shape or P % 2 or P > K:
        shapes = ", ".join(str(tuple(x.shape)) for x in (x_BTHK, cos_BTP, sin_BTP))
        raise ValueError(f"rotate_heads: x, cos and sin do not fit together: {shapes}")
    form = _choose("rotate_heads", backend, (x_BTHK, cos_BTP, sin_BTP))
    if form == "triton":
        from radlads.kernels.mixer_ops.triton_rotate import rotate_heads_triton

        return rotate_heads_triton(x_BTHK, cos_BTP, sin_BTP)
    return rotate_heads_torch(x_BTHK, cos_BTP, sin_BTP)  # on the meta device too: it keeps nothing of x


def _choose(operator: str, backend: Form | None, tensors: tuple[Tensor, ...]) -> Literal["torch", "triton", "meta"]:
    """The form that runs; tensors [B,T,...], the first one [B,T,H or G,K]."""
    if tensors[0].is_meta:
        return "meta"
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"{operator}: unknown backend {backend!r}; choose from torch, triton")
    if torch.compiler.is_compiling() and backend is None:
        return "torch"  # whose operations it fuses itself
    reason = "requested" if backend == "torch" else why_not_fused(tensors)
    if backend == "triton" and reason is not None:
        raise ValueError(f"{operator}: backend 'triton' cannot run here: {reason}")
    note_kernel(operator, "triton" if reason is None else "plain torch", lambda: reason or "")
    return "triton" if reason is None else "torch"


def why_not_fused(tensors: tuple[Tensor, ...]) -> str | None:
    """Why the Triton kernels of this package cannot take these tensors, in one line; None if they can. Every design of
    an RWKV-7 mixer is covered: only devices, dtypes and the size of a head can stand against it."""
    x = tensors[0]
    if not triton_installed():
        return "triton is not installed" if x.is_cuda else not_on_gpu(x)
    from radlads.kernels.shared.triton_launch import current_backend, why_not_in_triton

    if reason := why_not_in_triton(x, x.shape[-1], current_backend()):
        return reason
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return None if len(dtypes) == 1 else f"the tensors differ in dtype: {', '.join(dtypes)}"


def _check(
    k: Tensor, v: Tensor, w_low: Tensor, a_low: Tensor, values: Residual | AddedValues | None, keys: Residual | None
) -> None:
    B, T, G, K = k.shape
    A = w_low.shape[-1]
    if v.shape != k.shape or w_low.shape != (B, T, A) or a_low.shape != w_low.shape or A % (G * K):
        shapes = ", ".join(str(tuple(x.shape)) for x in (k, v, w_low, a_low))
        raise ValueError(f"wkv7_operands: k, v, w_low and a_low do not fit together: {shapes}")
    if isinstance(values, AddedValues):
        if values.low.shape != w_low.shape:
            raise ValueError(f"wkv7_operands: added values must be {tuple(w_low.shape)}, got {tuple(values.low.shape)}")
        values = None
    for name, residual, widths in (("values", values, (G * K, A)), ("keys", keys, (G * K,))):
        if residual is None:
            continue
        width = residual.first.shape[2:].numel()
        if width not in widths or residual.low.shape != (B, T, width) or residual.offset.numel() != width:
            raise ValueError(
                f"wkv7_operands: the residual of {name} has the widths {width}, {residual.low.shape[-1]} and "
                f"{residual.offset.numel()}; all three must be {' or '.join(map(str, dict.fromkeys(widths)))}"
            )
