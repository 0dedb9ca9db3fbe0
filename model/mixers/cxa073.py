"""cxa073, the mixer of PRWKV-7-Reka-Flash-3-21B (OpenMOSE, RWKVInside, April 2025): stock keys and GroupNorm, no gate.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input; no token shift, no RoPE. All maps are per token. (cxa074 is the same function.)

    r = norm(x q_proj)                              [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(norm(x k_proj)),  v = repeat(x v_proj)   [H,K]  kv head g serves H/G query heads in a row
    v = v + (v_first - v) ⊙ σ(v0 + x v1 v2)         [A]        not in the first recurrent layer, whose v is v_first
    w_raw = -softplus(-(w0 + tanh(x w1) w2)) - 0.6  [A]        log_decay = -e^w_raw, decay in (0.5776, 1)
    iclr = σ(a0 + x a1 a2)                          [A]
    kk = k ⊙ k_k / ‖k ⊙ k_k‖                                   removal key
    k = k ⊙ (1 + (iclr - 1) ⊙ k_a)
    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ     y_t = r_tᵀ S_t      S [K,V] fp32
    y = GroupNorm over H groups (y), eps 64e-5, + (Σ_K r ⊙ k ⊙ r_k) v           bonus with the scaled k
    out = y o_proj                                  [D]

The published training did not pass the gradient through v_first (`first_values_gradient: false`); the function is the
same. The offset is 0.6 and not RWKV-7's 0.5: it bounds what its kernel divides by.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from radlads.model.mixers.shared.mixer import AttentionShape
from radlads.model.mixers.shared.options import STOCK_RANKS, Rank, StockOptions
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer


class Options(StockOptions):
    """Choices of cxa073; its ranks follow from A."""

    RANKS: ClassVar[dict[str, Rank]] = {name: rank for name, rank in STOCK_RANKS.items() if name != "gate_rank"}


class Mixer(Rwkv7Mixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {
        "decay_offset": 0.6,
        "key_scaling": "k_a",
        "group_norm_eps": 64e-5,
        "output_scale": "none",
    }

    @classmethod
    def design_of(cls, options: Any, shape: AttentionShape) -> Design:
        return Design(
            decay_offset=cls.CONSTANTS["decay_offset"],
            key_scaling="k_a",
            first_values="heads",
            first_values_gradient=options.first_values_gradient,
            group_norm_eps=cls.CONSTANTS["group_norm_eps"],
            bonus=True,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start; Options has the deviations."""
        super().reset_parameters()
        self.start_as_stock()
