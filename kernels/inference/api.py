"""`linear_together`, `gated_linear`, `low_rank_pairs`: one launch for what a decoding step multiplies a few rows by,
instead of one a matrix; `silu_product` and `rms_norm`, for any number of rows. Forward only. Dims: as in
reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from radlads.kernels.inference.reference import (
    MOST_TOGETHER,
    Activation,
    gated_linear_torch,
    linear_together_torch,
    low_rank_pairs_torch,
    rms_norm_torch,
    silu_product_torch,
)
from radlads.kernels.shared.backends import triton_installed
from radlads.kernels.shared.chosen import note_kernel

MOST_ROWS = 16
"""Tokens of all rows together up to which a step's products are bound by reading weights, not by arithmetic."""
WIDEST_NORM = 16384
FEWEST_NUMBERS = 2**23
"""Of a tensor from which a launch of Triton's, which costs the host three of torch's, is worth the memory traffic. A
step is replayed, without launches."""
_SIZES = (torch.bfloat16, torch.float16)


def few_rows_apply(x_BTD: Tensor) -> bool:
    """Whether a pass over these rows may use the products of this package: at most MOST_ROWS of them, in 16 bits, on a
    GPU, without gradients, and while torch.compile does not trace."""
    return is_inference(x_BTD) and x_BTD.dtype in _SIZES and 0 < x_BTD.numel() <= MOST_ROWS * x_BTD.shape[-1]


def is_inference(x: Tensor) -> bool:
    """Whether Triton's forward-only kernels can take x."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and triton_installed()


def linear_together(
    xs_BTD: Sequence[Tensor],
    weights_OD: Sequence[Tensor],
    biases_O: Sequence[Tensor | None],
    *,
    triton: bool | None = None,
) -> list[Tensor]:
    """x Wᵀ + b of every triple, [B,T,O] each. All x have one shape; the matrices may differ in O.

    triton: None asks `few_rows_apply`. Raises ValueError for more than MOST_TOGETHER places and for shapes that differ.
    """
    _check("linear_together", xs_BTD, weights_OD, biases_O)
    if _choose("linear_together", xs_BTD[0], weights_OD, triton=triton):
        from radlads.kernels.inference.triton_linear import linear_together_triton

        return linear_together_triton(xs_BTD, weights_OD, biases_O)
    return linear_together_torch(xs_BTD, weights_OD, biases_O)


def gated_linear(x_BTD: Tensor, gate_OD: Tensor, up_OD: Tensor, *, triton: bool | None = None) -> Tensor:
    """silu(x gateᵀ) ⊙ (x upᵀ), [B,T,O]: the inner half of a gated MLP. Raises ValueError for shapes that differ."""
    _check("gated_linear", [x_BTD] * 2, [gate_OD, up_OD])
    if gate_OD.shape != up_OD.shape:
        raise ValueError(f"gated_linear: gate and up differ: {tuple(gate_OD.shape)}, {tuple(up_OD.shape)}")
    if _choose("gated_linear", x_BTD, (gate_OD, up_OD), triton=triton):
        from radlads.kernels.inference.triton_linear import gated_linear_triton

        return gated_linear_triton(x_BTD, gate_OD, up_OD)
    return gated_linear_torch(x_BTD, gate_OD, up_OD)


def low_rank_pairs(
    xs_BTD: Sequence[Tensor],
    firsts_DR: Sequence[Tensor],
    seconds_RA: Sequence[Tensor],
    activations: Sequence[Activation | None],
    *,
    triton: bool | None = None,
) -> list[Tensor]:
    """activation(x first) second of every place, [B,T,A] each, in two launches. Ranks and widths may differ.

    Raises ValueError for more than MOST_TOGETHER places and for shapes that do not fit together.
    """
    _check("low_rank_pairs", xs_BTD, [first.T for first in firsts_DR], seconds_RA, activations)
    for first, second in zip(firsts_DR, seconds_RA, strict=True):
        if first.shape[1] != second.shape[0]:
            raise ValueError(f"low_rank_pairs: {tuple(first.shape)} and {tuple(second.shape)} do not fit together")
    if _choose("low_rank_pairs", xs_BTD[0], (*firsts_DR, *seconds_RA), triton=triton):
        from radlads.kernels.inference.triton_low_rank import low_rank_pairs_triton

        return low_rank_pairs_triton(xs_BTD, firsts_DR, seconds_RA, activations)
    return low_rank_pairs_torch(xs_BTD, firsts_DR, seconds_RA, activations)


def silu_product(gate: Tensor, up: Tensor, *, triton: bool | None = None) -> Tensor:
    """silu(gate) ⊙ up in one pass over memory, for any number of rows. Raises ValueError for shapes that differ."""
    if gate.shape != up.shape:
        raise ValueError(f"silu_product: gate and up differ: {tuple(gate.shape)}, {tuple(up.shape)}")
    fits = _pays(gate) if triton is None else triton
    fits = fits and gate.dtype == up.dtype != torch.float64
    note_kernel("silu_product", "triton" if fits else "plain torch")
    if fits:
        from radlads.kernels.inference.triton_rows import silu_product_triton

        return silu_product_triton(gate, up)
    return silu_product_torch(gate, up)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, triton: bool | None = None) -> Tensor:
    """x / √(mean x² + eps) ⊙ weight over the last axis, summed in fp32 and rounded once. Raises ValueError for a weight
    of another width."""
    if weight_D.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} and weight {tuple(weight_D.shape)} do not fit together")
    fits = _pays(x) if triton is None else triton
    fits = fits and x.dtype != torch.float64 and x.shape[-1] <= WIDEST_NORM
    note_kernel("rms_norm", "triton" if fits else "plain torch")
    if fits:
        from radlads.kernels.inference.triton_rows import rms_norm_triton

        return rms_norm_triton(x, weight_D, eps)
    return rms_norm_torch(x, weight_D, eps)


def _pays(x: Tensor) -> bool:
    return is_inference(x) and (x.numel() >= FEWEST_NUMBERS or x.shape[:2].numel() <= MOST_ROWS)


def _choose(operator: str, x: Tensor, weights: Sequence[Tensor], *, triton: bool | None) -> bool:
    fits = few_rows_apply(x) if triton is None else triton
    # A tensor of another class (an 8-bit weight, a sharded one) computes its products itself.
    plain = all(type(w) in (Tensor, torch.nn.Parameter) and w.dtype == x.dtype and w.is_contiguous() for w in weights)
    note_kernel(operator, "triton" if fits and plain else "plain torch")
    return fits and plain


def _check(operator: str, xs: Sequence[Tensor], weights_OD: Sequence[Tensor], *others: Sequence[object]) -> None:
    places = {len(xs), len(weights_OD), *map(len, others)}
    if len(places) != 1 or not 0 < len(xs) <= MOST_TOGETHER:
        raise ValueError(f"{operator} takes 1 to {MOST_TOGETHER} of each, as many of one as of the other: {places}")
    if any(x.shape != xs[0].shape or x.shape[-1] != w.shape[1] for x, w in zip(xs, weights_OD, strict=True)):
        shapes = ", ".join(f"{tuple(x.shape)} by {tuple(w.shape)}" for x, w in zip(xs, weights_OD, strict=True))
        raise ValueError(f"{operator}: shapes do not fit together: {shapes}")
