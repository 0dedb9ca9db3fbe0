"""Products of a mixer with its weights: one launch for all that a decoding step reads, elsewhere one a matrix. An
exported model carries this file.

Dims: B batch, T time, D model width, R low rank, A width of a mixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from radlads.kernels.inference import few_rows_apply, is_inference, linear_together, low_rank_pairs

LOW_RANK = "wavkg"
"""The low-rank maps that a design of RWKV-7 may have: w1 and w2, a1 and a2, …"""
_ACTIVATIONS: dict[str, Any] = {"w": "tanh", "g": "sigmoid"}


class Terms(NamedTuple):
    """What the low-rank maps give, [B,T,A] (or the width of kv heads); None for those that a variant lacks."""

    w: Tensor | None
    a: Tensor | None
    v: Tensor | None
    k: Tensor | None
    g: Tensor | None


def project_together(xs_BTD: Sequence[Tensor], layers: Sequence[nn.Module]) -> list[Tensor]:
    """What every layer makes of its x."""
    if few_rows_apply(xs_BTD[0]) and all(map(is_plain_linear, layers)):
        return linear_together(xs_BTD, [layer.weight for layer in layers], [layer.bias for layer in layers])
    return [layer(x) for x, layer in zip(xs_BTD, layers, strict=True)]


def reads_in_16_bits(k_BTGK: Tensor, one_token: bool) -> bool:
    """Whether the log decay is rounded as training rounds it, for the kernels that take 16 bits alone."""
    return not one_token and k_BTGK.dtype in (torch.bfloat16, torch.float16) and is_inference(k_BTGK)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is torch's own and nobody watches or replaces its call (low-rank updates, quantised or offloaded
    weights, hooks)."""
    return (
        type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and "forward" not in layer.__dict__
    )


def first_factors(mixer: Any, inputs: Any) -> list[Tensor | None]:
    """Every branch of `inputs` by the first factor of its map."""
    firsts = (getattr(mixer, f"{name}1", None) for name in LOW_RANK)
    return [None if one is None else getattr(inputs, name) @ one for name, one in zip(LOW_RANK, firsts, strict=True)]


def second_factors(mixer: Any, low_BTR: Sequence[Tensor | None]) -> Terms:
    """The terms, from products with the first factors."""
    found: list[Tensor | None] = []
    for name, low in zip(LOW_RANK, low_BTR, strict=True):
        activation = getattr(torch, _ACTIVATIONS.get(name, ""), None)
        inner = low if low is None or activation is None else activation(low)
        found.append(None if inner is None else inner @ getattr(mixer, f"{name}2"))
    return Terms(*found)


def low_rank_terms(mixer: Any, inputs: Any) -> Terms:
    """The terms of a few rows, in two launches."""
    names = [name for name in LOW_RANK if getattr(mixer, f"{name}1", None) is not None]
    outs = low_rank_pairs(
        [getattr(inputs, name) for name in names],
        [getattr(mixer, f"{name}1") for name in names],
        [getattr(mixer, f"{name}2") for name in names],
        [_ACTIVATIONS.get(name) for name in names],
    )
    found = dict(zip(names, outs, strict=True))
    return Terms(*map(found.get, LOW_RANK))
