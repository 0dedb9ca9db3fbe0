"""Layers that stay softmax attention, or linear attention of the teacher's own: their module is the family's, called
with the mixers' context. Hooks on it decide about rotary positions and the scale of the scores.

Dims: B batch, T time, H query heads, K dim per head, P rotated dims (K or fewer). Needs torch only: an exported model
carries this file.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from radlads.model.mixers.shared.mixer import MixerContext

CONTEXT = "mixer_context"
"""The keyword that decoder layers pass to attention."""
ROW_PART = "row_part"
"""The keyword of a pass over rows that several ranks share, in training (`MixerContext`)."""


def keep_attention(attention: nn.Module, config: Any, layer: int) -> None:
    """Let a softmax attention module accept the mixers' context, which determines whether it uses rotary positions, and
    by how much its scores are scaled.

    config: the student's RadladsConfig. Where the teacher's layer has a window, scores are not scaled: the number of
    tokens that it sees does not grow.
    """
    attention._forward_pre_hooks = OrderedDict()
    attention._forward_pre_hooks_with_kwargs = OrderedDict()
    scales = layer not in config.windowed_layers()
    attention.register_forward_pre_hook(_Adapt(config.family, layer, scales=scales), with_kwargs=True)


def keep_linear_attention(attention: nn.Module) -> None:
    """Let a module that is linear attention in the teacher already be called with the mixers' context."""
    attention.register_forward_pre_hook(_without_context, with_kwargs=True)


def log_scale(positions: Tensor, base: int) -> Tensor:
    """s = log_a(t + a) = log(t + a) / log a, fp32, in the shape of positions t, which count a document's tokens from 0.

    HALO (2601.22156; its code counts from 0 too) scales the scores of attention without positions by it: the more keys
    there are, the more weight goes to those that do not matter, unless scores grow with log t (scalable softmax,
    2501.19399). base: a; s is 1 for the first token, 1.11 at t = a = 512, 1.38 at t = 10 a.
    """
    return torch.log(positions.float() + base) / math.log(base)


class FadedPositions:
    """Rotary positions whose angles are multiplied by a factor from 1 (the teacher's) to 0 (none), for kept layers.

    Where a family's cosines have a factor of their own (YaRN's), it goes to 1 with them.
    """

    def __init__(self, rotary: nn.Module, layer_types: Sequence[str] | None, positions: Tensor, factor: Tensor) -> None:
        """rotary: the backbone's. layer_types: of its config. positions: of the pass; factor: a scalar, read on the
        device alone, so that a recorded pass follows it."""
        by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
        self.rotary, self.factor = rotary, factor
        self.positions = positions.float() * factor
        self.layer_types = layer_types if by_kind else None
        self._made: dict[str | None, tuple[Tensor, Tensor]] = {}

    def embeddings(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a layer, in the shape, the dtype and on the device of `like`, its own cosines."""
        kind = None if self.layer_types is None else self.layer_types[layer]
        if kind not in self._made:
            named, prefix = ({}, "") if kind is None else ({"layer_type": kind}, f"{kind}_")
            # Without what chooses frequencies by the length of a row (dynamic, longrope): faded positions are those of
            # a shorter one. The pass has chosen already, for its own cosines.
            with torch.no_grad():
                cos, sin = inspect.unwrap(type(self.rotary).forward)(self.rotary, like, self.positions, **named)
            own = float(getattr(self.rotary, f"{prefix}attention_scaling", 1.0))
            if own != 1.0:
                scale = (1 + self.factor * (own - 1)) / own
                cos, sin = ((x * scale).to(like.dtype) for x in (cos, sin))
            self._made[kind] = cos, sin
        cos, sin = self._made[kind]
        return cos.to(like.device), sin.to(like.device)


class _Adapt:
    """Forward pre-hook of a kept softmax attention."""

    def __init__(self, family: Mapping[str, Any], layer: int, *, scales: bool) -> None:
        self.layer, self.scales = layer, scales
        self.norm, self.fused, self.o = family.get("q_norm"), family.get("qkv"), family["o"]
        self.queries = self.norm or self.fused or family["q"]
        self._waiting: Any = None

    def __call__(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(kwargs)
        context: MixerContext | None = given.pop(CONTEXT, None)
        if context is None:
            return args, given
        if context.row_part is not None:
            given[ROW_PART] = context.row_part
        if not context.attention_rope:
            cos, sin = given["position_embeddings"]
            if context.faded is not None:
                given["position_embeddings"] = context.faded.embeddings(self.layer, cos)
            else:
                given["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        if context.score_scale is not None and self.scales:
            self._scale_queries(attention, context.score_scale)
        return args, given

    def _scale_queries(self, attention: nn.Module, scale_BT: Tensor) -> None:
        """Scale the queries of the call that begins: scores are linear in them, whatever computes the scores.

        The module that makes them (a norm, or a projection) is the teacher's too where layers are restored, and another
        one where a low-rank update wraps it; so the hook is put there for one call.
        """
        if self._waiting is not None:  # a call that failed before it came to its queries
            self._waiting.remove()
        width = getattr(attention, self.o).in_features if self.fused and not self.norm else None

        def scaled(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            self._waiting.remove()
            self._waiting = None
            scale = _over_channels(scale_BT.to(out.device), out, inputs[0])
            if width is None:
                return (out * scale).to(out.dtype)
            return torch.cat([(out[..., :width] * scale).to(out.dtype), out[..., width:]], -1)

        self._waiting = getattr(attention, self.queries).register_forward_hook(scaled)


def _over_channels(scale_BT: Tensor, out: Tensor, inputs: Tensor) -> Tensor:
    """The scale so that it multiplies queries [B,T,·], [B,T,H,K] or [B,H,T,K]: families norm before or after they put
    heads first. Where there are as many heads as tokens, strides tell: a transposed view has the smaller one first."""
    T = scale_BT.shape[-1]
    if out.ndim == 3:
        return scale_BT[..., None]
    heads_first = inputs.stride(1) < inputs.stride(2) if out.shape[1] == out.shape[2] else out.shape[2] == T
    return scale_BT[:, None, :, None] if heads_first else scale_BT[:, :, None, None]


def _without_context(
    attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != CONTEXT}
