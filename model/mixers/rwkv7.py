"""rwkv7: the official RWKV-7 time mixer (x070, BlinkDL), in attention's place as ARWKV has it (arXiv 2501.15570).

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input, d_t = x_{t-1} - x_t (x before the first token: 0). Per token:

    x_r = x + d ⊙ μ_r,  likewise x_w, x_k, x_v, x_a, x_g       [D]   μ: x_r, x_w, ..., x_g among the parameters
    r = norm(x_r q_proj)                            [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(norm(x_k k_proj))                    [H,K]      repeat: kv head g serves H/G query heads in a row
    v = repeat(x_v v_proj)                          [H,K]
    v = v + (v_first - v) ⊙ σ(v0 + x_v v1 v2)       [A]        not in the first recurrent layer, whose v is v_first
    w_raw = -softplus(-(w0 + tanh(x_w w1) w2)) - 1/2  [A]      log_decay = -e^w_raw, decay in (0.5452, 1)
    iclr = σ(a0 + x_a a1 a2)                        [A]
    kk = k ⊙ k_k / ‖k ⊙ k_k‖                                   removal key
    k = k ⊙ (1 + (iclr - 1) ⊙ k_a)
    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ     y_t = r_tᵀ S_t      S [K,V] fp32
    y = GroupNorm over H groups (y), eps 64e-5, + (Σ_K r ⊙ k ⊙ r_k) v           bonus with the scaled k
    out = (y ⊙ σ(x_g g1) g2) o_proj                 [D]

ARWKV: `token_shift`, `gate` and `group_norm` switch their term off. The state holds the last input beside S. The
official model repeats nothing (G = H) and has neither RoPE nor q/k norms.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from radlads.model.mixers.shared.mixer import AttentionShape
from radlads.model.mixers.shared.options import INITIAL, STOCK_RANKS, Rank, StockOptions
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer


class Options(StockOptions):
    """Choices of rwkv7; its ranks follow from A."""

    RANKS: ClassVar[dict[str, Rank]] = STOCK_RANKS

    token_shift: bool = True
    """Mix each token with the one before it."""
    gate: bool = True
    """False: ARWKV's form without gate."""
    group_norm: bool = True
    """False: ARWKV's form without GroupNorm; nothing scales the output then."""
    token_shift_init: Annotated[Literal["none", "official"], INITIAL] = "none"
    """none: every branch starts on the token itself, as the teacher does. official: what pretraining starts from."""
    gate_init: Annotated[Literal["published", "identity"], INITIAL] = "published"
    """published: a small random signed gate. identity: the same parameters, started so that the gate is 1."""
    gate_rank: int | None = Field(default=None, ge=1)


class Mixer(Rwkv7Mixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {
        "decay_offset": 0.5,
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
            group_norm_eps=cls.CONSTANTS["group_norm_eps"] if options.group_norm else None,
            bonus=True,
            gate="product" if options.gate else "none",
            token_shift=options.token_shift,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official start, but for the token shift; Options has the deviations."""
        super().reset_parameters()
        self.start_as_stock()
        self.start_gate()
        if self.options.token_shift:
            self._start_shift()

    def _start_shift(self) -> None:
        """Official: 1 - (n/D)^(e·u) - s·depth, with u = 1 - layer/layers."""
        powers = {"r": (0.2, 0.0), "w": (0.9, 0.0), "k": (0.9, 0.4), "v": (0.4, 0.6), "a": (0.9, 0.0), "g": (0.2, 0.0)}
        D = self.shape.hidden_size
        part = torch.arange(D, dtype=torch.float32, device=self.w0.device).view(1, 1, D) / D
        for name, (exponent, slope) in powers.items():
            shift = getattr(self, f"x_{name}", None)
            if shift is None:
                continue
            shift.zero_()
            if self.options.token_shift_init == "official":
                u = 1 - self.layer / self.num_layers
                shift.copy_(1 - part ** (exponent * u) - slope * self.depth)
