"""Properties that a mixer takes from the attention that it replaces, besides weights: sizes, norms, rotation, scale.

Needs torch only: an exported model carries this file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AttentionShape:
    """Properties of an attention module, read from it and its family's code, never from a config's defaults."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_bias: bool
    k_bias: bool
    v_bias: bool
    o_bias: bool
    qk_norm: bool
    norm_eps: float
    norm: Callable[[int, float], nn.Module] | None = None
    """The family's class of q/k norms, called with (width, eps); None is Llama's."""
    norm_all_heads: bool = False
    """Whether one norm goes over all heads of q (of k) at once, rather than over each head."""
    rotary: Callable[..., Any] | None = None
    """The family's `apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)`; None rotates halves of a head."""
    rotates: bool = True
    """False in layers without rotary positions."""
    output_gate: bool = False
    """Whether q_proj also gives, beside each head's query, a gate on that head's output: [query | gate] a head."""
    q_scale: float = 1.0
    """The scale of the scores divided by the usual K^(-1/2). Linear attention has no scores, so r is multiplied by
    it."""

    @property
    def width(self) -> int:
        """A = H·K; differs from D in some teachers."""
        return self.num_heads * self.head_dim


def read_attention_shape(attention: nn.Module, family: Any, norm_eps: float) -> AttentionShape:
    """The shape of a softmax attention module; `family` names its projections, or the one that holds all of them."""
    head_dim, o = int(attention.head_dim), getattr(attention, family.o)
    fused = getattr(family, "qkv", None)
    q_width = o.in_features
    if fused:
        q = k = v = getattr(attention, fused)
        kv_width = (q.out_features - q_width) // 2
    else:
        q, k, v = (getattr(attention, name) for name in (family.q, family.k, family.v))
        kv_width = k.out_features
    norm = getattr(attention, family.q_norm) if family.q_norm is not None else None
    scale = float(getattr(attention, "scaling", head_dim**-0.5)) * head_dim**0.5
    return AttentionShape(
        hidden_size=q.in_features,
        num_heads=q_width // head_dim,
        num_kv_heads=kv_width // head_dim,
        head_dim=head_dim,
        q_bias=q.bias is not None,
        k_bias=k.bias is not None,
        v_bias=v.bias is not None,
        o_bias=o.bias is not None,
        qk_norm=norm is not None,
        norm_eps=norm_eps,
        norm=None if norm is None else type(norm),
        norm_all_heads=norm is not None and norm.weight.numel() != head_dim,
        rotary=getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None),
        output_gate=not fused and q.out_features == 2 * q_width,
        rotates=_rotates(attention, getattr(family, "rotates", ())),
        q_scale=1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale,
    )


def _rotates(attention: nn.Module, conditions: tuple[str, ...] | list[str]) -> bool:
    """Whether one of the attributes is true (`not x`: false or None)."""
    return not conditions or any(
        bool(getattr(attention, name.removeprefix("not "))) != name.startswith("not ") for name in conditions
    )
