"""hxa07a (OpenMOSE, RWKVInside, 2025): hxa079 without first-layer values and keys and without the bonus.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input; no token shift, no first-layer values. All maps are per token.

    r = rope(norm(x q_proj))                        [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(rope(norm(x k_proj)))                [H,K]      repeat: kv head g serves H/G query heads in a row
    v = repeat(x v_proj)                            [H,K]
    w_raw = -softplus(-(w0 + tanh(x w1) w2)) - 1/2  [A]        log_decay = -e^w_raw, decay in (0.5452, 1)
    iclr = σ(a0 + x a1 a2)                          [A]
    kk = k / ‖k‖                                               removal key, in fp32
    k = k ⊙ (1 - decay + iclr)                                 key_scaling: decay
    k = k ⊙ (1 - w_raw + iclr)                                 key_scaling: log_log_decay, as published
    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ     y_t = r_tᵀ S_t      S [K,V] fp32
    out = (y · K^(-1/2) ⊙ σ(x g1) g2) o_proj        [D]        no GroupNorm, no bonus

The published key scaling takes the log-log decay, which multiplies slow channels by 8 to 9 instead of about iclr:
weights made with it load with `key_scaling: log_log_decay`. The default is the corrected form, hxa07c's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from radlads.model.mixers.shared.mixer import AttentionShape
from radlads.model.mixers.shared.options import HxaOptions, Rank
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer


class Options(HxaOptions):
    """Choices of hxa07a; its ranks follow from A."""

    RANKS: ClassVar[dict[str, Rank]] = {
        "decay_rank": Rank(0.6, 1.7),
        "iclr_rank": Rank(0.5, 1.3),
        "gate_rank": Rank(0.6, 1.7),
    }

    key_scaling: Literal["decay", "log_log_decay"] = "decay"
    """log_log_decay: as published; needed for published weights, not for new conversions."""


class Mixer(Rwkv7Mixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {"decay_offset": 0.5, "output_scale": "head_dim^-0.5"}

    @classmethod
    def design_of(cls, options: Any, shape: AttentionShape) -> Design:
        return Design(
            decay_offset=cls.CONSTANTS["decay_offset"],
            key_scaling=options.key_scaling,
            output_scale=True,
            gate="product",
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start; Options has the deviations."""
        super().reset_parameters()
        self.start_on_ramps()
