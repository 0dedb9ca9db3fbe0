"""`wkv7_operands`: from projected keys, values and low-rank terms to the operands of wkv7; reference.py has the
equations."""

from __future__ import annotations

import torch
from torch import Tensor

from radlads.kernels.mixer_ops.reference import Operands, Residual, wkv7_operands_reference
from radlads.kernels.shared.backends import triton_installed


def wkv7_operands(
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
    """The operands; equations in reference.py. On a GPU one Triton kernel, else `wkv7_operands_reference`.

    Gradients flow to every tensor. Raises ValueError, in one line, for shapes that do not fit together, and for a
    residual of keys at full width.
    """
    _check(k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, values, keys)
    inputs = (k_BTGK, v_BTGK, w_low_BTA, a_low_BTA, w0_A, a0_A)
    options = {
        "values": values,
        "keys": keys,
        "decay_offset": decay_offset,
        "log_log": log_log,
        "decay_dtype": decay_dtype,
    }
    if k_BTGK.is_cuda and triton_installed() and k_BTGK.dtype != torch.float64:
        from radlads.kernels.mixer_ops.triton_operands import wkv7_operands_triton

        return wkv7_operands_triton(*inputs, **options)
    return wkv7_operands_reference(*inputs, **options)


def _check(k: Tensor, v: Tensor, w_low: Tensor, a_low: Tensor, values: Residual | None, keys: Residual | None) -> None:
    B, T, G, K = k.shape
    A = w_low.shape[-1]
    if v.shape != k.shape or w_low.shape != (B, T, A) or a_low.shape != w_low.shape or A % (G * K):
        shapes = ", ".join(str(tuple(x.shape)) for x in (k, v, w_low, a_low))
        raise ValueError(f"wkv7_operands: k, v, w_low and a_low do not fit together: {shapes}")
    for name, residual, widths in (("values", values, (G * K, A)), ("keys", keys, (G * K,))):
        if residual is None:
            continue
        width = residual.first.shape[2:].numel()
        if width not in widths or residual.low.shape != (B, T, width) or residual.offset.numel() != width:
            raise ValueError(
                f"wkv7_operands: the residual of {name} has the widths {width}, {residual.low.shape[-1]} and "
                f"{residual.offset.numel()}; all three must be {' or '.join(map(str, dict.fromkeys(widths)))}"
            )
