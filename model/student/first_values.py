"""First values where the first softmax layer stays attention: its own values (and keys), as its mixer would give them.

Dims: B batch, T time, D model width, G kv heads, K dim per head. Needs torch only: an exported model carries this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from radlads.model.mixers.shared.attention_shape import read_attention_shape
from radlads.model.mixers.shared.mixer import FirstValues, MixerContext, to_heads
from radlads.model.mixers.shared.registry import mixer_class
from radlads.model.student.kept_attention import CONTEXT


def hand_on_first_values(attention: nn.Module, config: Any, layer: int) -> None:
    """Let a layer's softmax attention set the pass's first values, if it is the layer that has to (`first_attention`).

    config: the student's RadladsConfig. The attention must accept the mixers' context (`keep_attention`) already.
    """
    if layer == config.first_attention():
        attention.register_forward_pre_hook(_SetFirst(config, attention), with_kwargs=True, prepend=True)


def attention_first_values(
    config: Any, attention: nn.Module, x_BTD: Tensor, rope: tuple[Tensor, Tensor]
) -> FirstValues:
    """What a softmax attention hands on of its (normed) inputs: v_proj's values, and keys as a mixer makes them, normed
    and with the variant's rotary positions, whatever `attention_rope` says. Without a token shift, which attention does
    not have. Empty for a variant without first values."""
    return _Reader(config, attention)(attention, x_BTD, rope)


class _Reader:
    """Reads first values from an attention; all that does not change with the tokens is found once."""

    def __init__(self, config: Any, attention: nn.Module) -> None:
        self.parts = SimpleNamespace(**config.family)
        self.shape = read_attention_shape(attention, self.parts, getattr(config, "rms_norm_eps", 1e-6))
        self.options, self.mixer = SimpleNamespace(**config.options), mixer_class(config.variant)

    def __call__(self, attention: nn.Module, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> FirstValues:
        parts, shape = self.parts, self.shape
        fused = getattr(parts, "qkv", None)
        norm = getattr(attention, parts.k_norm) if shape.qk_norm else None

        def project(rotated: bool) -> tuple[Tensor, Tensor]:
            if fused:
                kv = shape.num_kv_heads * shape.head_dim
                k, v = getattr(attention, fused)(x_BTD)[..., shape.width :].split(kv, dim=-1)
            else:
                k, v = getattr(attention, parts.k)(x_BTD), getattr(attention, parts.v)(x_BTD)
            _, k, v = to_heads(shape, norm, norm, k, k, v, rope if rotated else None)
            return k, v

        return self.mixer.first_values_of(self.options, shape, project)


class _SetFirst:
    """Forward pre-hook of the attention."""

    def __init__(self, config: Any, attention: nn.Module) -> None:
        self.read = _Reader(config, attention)

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        context: MixerContext | None = kwargs.get(CONTEXT)
        if context is not None:
            x = args[0] if args else kwargs["hidden_states"]
            context.first = self.read(attention, x, kwargs["position_embeddings"])
