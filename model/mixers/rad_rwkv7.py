"""RAD-RWKV7, the mixer of RADLADS (arXiv 2505.03005, appendix A.2) in both of its published forms.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input; no token shift. All maps are per token.

    r = rope(norm(x q_proj))                        [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(rope(norm(x k_proj)))                [H,K]      repeat: kv head g serves H/G query heads in a row
    v = repeat(x v_proj)                            [H,K]
    v = v + (v_first - v) ⊙ σ(v0 + x v1 v2)                    not in the first recurrent layer, whose v is v_first
    iclr = σ(a0 + x a1 a2)                          [A]
    log_decay = -e^(-1/2) σ(w0 + tanh(x w1) w2)     [A]        decay = exp(log_decay) in (0.5452, 1)
    g = σ(x g1) g2                                  [A]        signed and unbounded: the sigmoid is between the factors

    form            kk (removal key)          key that is written               output
    balanced        k / ‖k‖                   k ⊙ (1 - decay + iclr)            o · K^(-1/2)
    groupnorm       k ⊙ k_k / ‖k ⊙ k_k‖       k ⊙ (1 + (iclr - 1) ⊙ k_a)        GroupNorm over H groups (o), eps K·1e-5

    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ    o_t = r_tᵀ S_t    S [K,V] fp32, per head
    out = (o ⊙ g) o_proj                            [D]

`balanced` is the paper's formulas; `groupnorm` (stock RWKV-7 keys) is what its code ships as default; it turns unstable
from about 14B parameters on. No bonus term in either.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from radlads.model.mixers.shared.mixer import AttentionShape
from radlads.model.mixers.shared.options import INITIAL, STOCK_RANKS, Rank, Rwkv7Options
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer


class Options(Rwkv7Options):
    """Choices of rad_rwkv7; its ranks follow from D (2505.03005, appendix)."""

    RANKS: ClassVar[dict[str, Rank]] = STOCK_RANKS

    form: Literal["balanced", "groupnorm"] = "balanced"
    """balanced: keys scaled so that the state stays bounded. groupnorm: a GroupNorm, unstable from 14B on."""
    rope: bool = True
    """Rotary positions on r and k, before the repeat; the teacher's own frequencies."""
    value_rank: int | None = Field(default=None, ge=1)
    gate_rank: int | None = Field(default=None, ge=1)
    value_residual_init: Annotated[float, INITIAL] = 1.0
    """v0. Published: 1, which starts every layer with 73 % of its values from the first layer; -4 starts with 2 %."""
    gate_init: Annotated[Literal["published", "identity"], INITIAL] = "published"
    """published: a small random signed gate, so that mixer outputs start near zero. identity: the same parameters,
    initialised so that the gate is 1; without GroupNorm the first outputs are many times too large, and short
    alignments end worse."""

    def resolve(self, hidden_size: int, width: int) -> Self:
        """Ranks by D, as published, and not by A."""
        return self.with_ranks(hidden_size)


class Mixer(Rwkv7Mixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {"decay_offset": 0.5, "group_norm_eps_per_channel": 1e-5}
    DRAW_ORDER: ClassVar[str] = "wagv"

    @classmethod
    def design_of(cls, options: Any, shape: AttentionShape) -> Design:
        balanced = options.form == "balanced"
        return Design(
            decay_offset=cls.CONSTANTS["decay_offset"],
            key_scaling="decay" if balanced else "k_a",
            first_values="heads",
            group_norm_eps=None if balanced else shape.head_dim * cls.CONSTANTS["group_norm_eps_per_channel"],
            output_scale=balanced,
            gate="product",
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start; Options has the deviations."""
        super().reset_parameters()
        self.start_as_stock()
        self.start_gate()
