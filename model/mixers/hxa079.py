"""hxa079, the mixer of HRWKV7-Reka-Flash-3.1 (OpenMOSE, RWKVInside, June 2025): first-layer values and keys, RoPE.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input; no token shift. All maps are per token.

    r = rope(norm(x q_proj))                        [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = rope(norm(x k_proj)),  v = x v_proj         [G,K]      at KV width; in the first recurrent layer these are
                                                               k_first and v_first
    v = v + (v_first - v) ⊙ σ(v0 + x v1 v2)         [G,K]      not in the first recurrent layer
    k = k + (k_first - k) ⊙ σ(k0 + x k1 k2)         [G,K]      likewise
    k, v = repeat(k), repeat(v)                     [H,K]      kv head g serves H/G query heads in a row
    w_raw = -softplus(-(w0 + tanh(x w1) w2)) - 1/2  [A]        log_decay = -e^w_raw, decay in (0.5452, 1)
    iclr = σ(a0 + x a1 a2)                          [A]
    kk = k / ‖k‖                                               removal key
    k = k ⊙ (1 - decay + iclr)                                 key_scaling: decay (hxa07d has the same)
    k = k ⊙ (1 - w_raw + iclr)                                 key_scaling: log_log_decay, as published
    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ     y_t = r_tᵀ S_t      S [K,V] fp32
    y = y · K^(-1/2) + (Σ_K r ⊙ k ⊙ r_k) v                     bonus with the scaled k; no GroupNorm
    out = (y ⊙ σ(x g1) g2) o_proj                   [D]

The published form differs in three ways from this file's defaults, each available as an option: its key scaling uses
the log-log decay, which multiplies slow channels by 8 to 9 instead of about iclr; the gradient does not pass through
v_first and k_first; and v0, k0 start at 0.73 in every channel, because the ramp that the published code subtracts is
never filled. Weights made with it load with `key_scaling: log_log_decay`. Its tensors carry the architecture marker 78.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from radlads.model.mixers.shared.mixer import AttentionShape
from radlads.model.mixers.shared.options import INITIAL, HxaOptions, Rank
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer


class Options(HxaOptions):
    """Choices of hxa079; its ranks follow from A."""

    RANKS: ClassVar[dict[str, Rank]] = {
        "decay_rank": Rank(0.6, 1.7),
        "iclr_rank": Rank(0.5, 1.8),
        "value_rank": Rank(0.5, 1.3),
        "key_rank": Rank(0.5, 1.3),
        "gate_rank": Rank(0.8, 0.35),
    }

    key_scaling: Literal["decay", "log_log_decay"] = "decay"
    """log_log_decay: as published; needed for published weights, not for new conversions."""
    first_values_gradient: bool = True
    """False: as published, deeper layers do not train the first one through v_first and k_first."""
    residual_init: Annotated[Literal["ramp", "constant"], INITIAL] = "ramp"
    """ramp: v0 and k0 decrease by 0.4 over the channels, as the code intends. constant: as published."""
    value_residual_init: Annotated[float, INITIAL] = 0.73
    """v0. Published: 0.73, which starts every layer with 67 % first-layer values; -4 starts with 2 %."""
    key_residual_init: Annotated[float, INITIAL] = 0.73
    """k0, likewise for keys."""
    value_rank: int | None = Field(default=None, ge=1)
    key_rank: int | None = Field(default=None, ge=1)
    rank_floor: Annotated[int, INITIAL] = Field(default=32, ge=1)
    """Least rank of decay and gate. 32: Reka Flash 3.1. 256: RWKVInside from July 2025 on."""

    def resolve(self, hidden_size: int, width: int) -> Self:
        """Ranks by A, those of decay and gate not under the floor."""
        ranks = self.with_ranks(width)
        floored = {
            n: max(self.rank_floor, getattr(ranks, n)) for n in ("decay_rank", "gate_rank") if not getattr(self, n)
        }
        return ranks.model_copy(update=floored)


class Mixer(Rwkv7Mixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {"decay_offset": 0.5, "output_scale": "head_dim^-0.5"}

    @classmethod
    def design_of(cls, options: Any, shape: AttentionShape) -> Design:
        return Design(
            decay_offset=cls.CONSTANTS["decay_offset"],
            key_scaling=options.key_scaling,
            first_values="kv",
            first_keys=True,
            first_values_gradient=options.first_values_gradient,
            output_scale=True,
            bonus=True,
            gate="product",
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start; Options has the deviations."""
        super().reset_parameters()
        self.start_on_ramps()
        self.r_k.fill_(-0.04)
        if self.v0 is not None:
            self._start_residual(self.v0, self.options.value_residual_init)
            self._start_residual(self.k0, self.options.key_residual_init)

    def _start_residual(self, offset: Tensor, value: float) -> None:
        line = torch.linspace(-0.5, 0.5, offset.numel(), device=offset.device).view_as(offset)
        offset.copy_(value - 0.4 * line) if self.options.residual_init == "ramp" else offset.fill_(value)
