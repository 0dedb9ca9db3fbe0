"""What the kernels of this package compute, in plain torch: one operation after the other, each rounded to the dtype of
its inputs. Dims: B rows, T tokens, D width in, O width out, R rank, A width of a mixer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

Activation = Literal["tanh", "sigmoid"]
MOST_TOGETHER = 5
"""Matrices of one launch: the low-rank maps that an RWKV-7 mixer may have."""


def linear_together_torch(
    xs_BTD: Sequence[Tensor], weights_OD: Sequence[Tensor], biases_O: Sequence[Tensor | None]
) -> list[Tensor]:
    """x Wᵀ + b of every triple."""
    return [linear(x, weight, bias) for x, weight, bias in zip(xs_BTD, weights_OD, biases_O, strict=True)]


def gated_linear_torch(x_BTD: Tensor, gate_OD: Tensor, up_OD: Tensor) -> Tensor:
    """silu(x gateᵀ) ⊙ (x upᵀ)."""
    return silu_product_torch(linear(x_BTD, gate_OD), linear(x_BTD, up_OD))


def silu_product_torch(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    return silu(gate) * up


def rms_norm_torch(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) ⊙ weight over the last axis."""
    return rms_norm(x, weight_D.shape, weight_D, eps)


def low_rank_pairs_torch(
    xs_BTD: Sequence[Tensor],
    firsts_DR: Sequence[Tensor],
    seconds_RA: Sequence[Tensor],
    activations: Sequence[Activation | None],
) -> list[Tensor]:
    """activation(x first) second of every place."""
    found = []
    for x, first, second, activation in zip(xs_BTD, firsts_DR, seconds_RA, activations, strict=True):
        low = x @ first
        found.append((low if activation is None else getattr(torch, activation)(low)) @ second)
    return found
