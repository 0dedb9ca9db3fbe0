"""hxa07c (OpenMOSE, RWKVInside, December 2025): hxa07b with the key scaling of RAD-RWKV7.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input; no token shift, no first-layer values. All maps are per token.

    r = rope(norm(x q_proj))                        [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(rope(norm(x k_proj)))                [H,K]      repeat: kv head g serves H/G query heads in a row
    v = repeat(x v_proj) + 0.2 · x v1 v2            [H,K]
    w_raw = -softplus(-(w0 + tanh(x w1) w2)) - 1/2  [A]        log_decay = -e^w_raw, decay in (0.5452, 1)
    iclr = σ(a0 + x a1 a2)                          [A]
    kk = k / ‖k‖                                               removal key, in fp32
    k = k ⊙ (1 - decay + iclr)
    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ     y_t = r_tᵀ S_t      S [K,V] fp32
    out = (y · K^(-1/2) ⊙ σ(x g1) g2) o_proj        [D]        no GroupNorm, no bonus

Published weights of hxa07b hold the same names and shapes: only their origin shows that they need the log-log decay.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from radlads.model.mixers.shared.mixer import AttentionShape, init_low_rank_out
from radlads.model.mixers.shared.options import HxaOptions, Rank
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer


class Options(HxaOptions):
    """Choices of hxa07c; its ranks follow from A."""

    RANKS: ClassVar[dict[str, Rank]] = {
        "decay_rank": Rank(0.6, 1.7, 256),
        "iclr_rank": Rank(0.5, 1.8, 128),
        "value_rank": Rank(0.5, 1.3),
        "gate_rank": Rank(0.6, 1.7, 256),
    }

    value_rank: int | None = Field(default=None, ge=1)


class Mixer(Rwkv7Mixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {
        "decay_offset": 0.5,
        "key_scaling": "decay",
        "value_lora_scale": 0.2,
        "output_scale": "head_dim^-0.5",
    }

    @classmethod
    def design_of(cls, options: Any, shape: AttentionShape) -> Design:
        return Design(
            decay_offset=cls.CONSTANTS["decay_offset"],
            key_scaling=cls.CONSTANTS["key_scaling"],
            value_lora_scale=cls.CONSTANTS["value_lora_scale"],
            output_scale=True,
            gate="product",
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start; Options has the deviations."""
        super().reset_parameters()
        self.start_on_ramps()
        for first_factor in (self.w1, self.a1, self.v1):
            init_low_rank_out(first_factor)
