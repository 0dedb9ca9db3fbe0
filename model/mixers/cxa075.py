"""cxa075, successor of cxa073 (OpenMOSE, RWKVInside, April 2025): no GroupNorm, a gate that starts at one.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input; no token shift, no RoPE. All maps are per token.

    r = norm(x q_proj)                              [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(norm(x k_proj)),  v = repeat(x v_proj)   [H,K]  kv head g serves H/G query heads in a row
    v = v + (v_first - v) ⊙ σ(v0 + x v1 v2)         [A]        not in the first recurrent layer, whose v is v_first
    w_raw = -softplus(-(w0 + tanh(x w1) w2)) - 1/2  [A]        log_decay = -e^w_raw, decay in (0.5452, 1)
    iclr = σ(a0 + x a1 a2)                          [A]
    kk = k ⊙ k_k / ‖k ⊙ k_k‖                                   removal key
    k = k ⊙ (1 + (iclr - 1) ⊙ k_a)
    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ     y_t = r_tᵀ S_t      S [K,V] fp32
    y = y + (Σ_K r ⊙ k ⊙ r_k) v                                bonus with the scaled k; neither norm nor scale
    out = (y ⊙ (1 + σ(x g1) g2)) o_proj             [D]        g1 = g2 = 0 at first: g2 learns at once, g1 after it

The published training did not pass the gradient through v_first (`first_values_gradient: false`); the function is the
same. Its tensors carry the architecture marker 73.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from radlads.model.mixers.shared.mixer import AttentionShape
from radlads.model.mixers.shared.options import STOCK_RANKS, Rank, StockOptions
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer


class Options(StockOptions):
    """Choices of cxa075; its ranks follow from A."""

    RANKS: ClassVar[dict[str, Rank]] = STOCK_RANKS

    gate_rank: int | None = Field(default=None, ge=1)


class Mixer(Rwkv7Mixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {
        "decay_offset": 0.5,
        "key_scaling": "k_a",
        "output_scale": "none",
    }

    @classmethod
    def design_of(cls, options: Any, shape: AttentionShape) -> Design:
        return Design(
            decay_offset=cls.CONSTANTS["decay_offset"],
            key_scaling="k_a",
            first_values="heads",
            first_values_gradient=options.first_values_gradient,
            bonus=True,
            gate="one_plus",
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start; Options has the deviations."""
        super().reset_parameters()
        self.start_as_stock()
        self.g2.zero_()
