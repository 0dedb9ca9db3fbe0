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

import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from radlads.model.mixers.shared.mixer import (
    AttentionShape,
    FirstValues,
    MixerOutput,
    MixerState,
    head_group_norm,
    init_low_rank_out,
    low_rank,
    rising_decay,
    start_gate_at_one,
    unit_keys,
)
from radlads.model.mixers.shared.mixer import (
    Mixer as BaseMixer,
)
from radlads.model.mixers.shared.options import Rank, Rwkv7Options
from radlads.model.mixers.shared.recurrence_wkv7 import run_wkv7


class Options(Rwkv7Options):
    """Choices of rad_rwkv7; its ranks follow from D (2505.03005, appendix)."""

    RANKS: ClassVar[dict[str, Rank]] = {
        "decay_rank": Rank(0.5, 1.8),
        "iclr_rank": Rank(0.5, 1.8),
        "value_rank": Rank(0.5, 1.3),
        "gate_rank": Rank(0.8, 0.6),
    }

    form: Literal["balanced", "groupnorm"] = "balanced"
    rope: bool = True
    """Rotary positions on r and k, before the repeat; the teacher's own frequencies."""
    value_rank: int | None = Field(default=None, ge=1)
    gate_rank: int | None = Field(default=None, ge=1)
    value_residual_init: float = 1.0
    """v0. Published: 1, which starts every layer with 73 % of its values from the first layer; -4 starts with 2 %."""
    gate_init: Literal["published", "identity"] = "published"
    """published: a small random signed gate, so that mixers start near silence. identity: the same parameters, started
    so that the gate is 1; without GroupNorm that starts many times too loud, and short alignments end worse."""

    def resolve(self, hidden_size: int, width: int) -> Self:
        """Ranks by D, as published, and not by A."""
        return self.with_ranks(hidden_size)


class Mixer(BaseMixer):
    """See the module's docstring. Raises nothing of its own."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {
        "decay_scale": math.exp(-0.5),
        "group_norm_eps_per_channel": 1e-5,
        "removal_key_scale_init": 0.85,
    }

    def __init__(self, shape: AttentionShape, options: Any, *, layer: int, num_layers: int, first: bool) -> None:
        """options: resolved, attributes as in `Options`. first: whether this is the model's first recurrent layer."""
        super().__init__(shape, layer, num_layers)
        self.options = options
        D, A = shape.hidden_size, shape.width
        self.w0, self.w1, self.w2 = low_rank(D, options.decay_rank, A)
        self.a0, self.a1, self.a2 = low_rank(D, options.iclr_rank, A)
        if first:
            self.v0 = self.v1 = self.v2 = None
        else:
            self.v0, self.v1, self.v2 = low_rank(D, options.value_rank, A)
        _, self.g1, self.g2 = low_rank(D, options.gate_rank, A)
        self.ln_x: nn.Module | None = None
        if options.form == "groupnorm":
            self.k_k = nn.Parameter(torch.empty(1, 1, A))
            self.k_a = nn.Parameter(torch.empty(1, 1, A))
            self.ln_x = nn.GroupNorm(
                shape.num_heads, A, eps=shape.head_dim * self.CONSTANTS["group_norm_eps_per_channel"]
            )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start of everything that the teacher does not give; Options has the deviations."""
        A = self.shape.width
        self.w0.copy_((rising_decay(A, self.depth, self.w0.device) + self.options.decay_shift).view(1, 1, A))
        self.a0.zero_()
        for first_factor, second_factor in ((self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2)):
            first_factor.zero_()
            init_low_rank_out(second_factor)
        if self.options.gate_init == "identity":
            start_gate_at_one(self.g2)
        if self.v0 is not None:
            self.v0.fill_(self.options.value_residual_init)
            self.v1.zero_()
            init_low_rank_out(self.v2)
        if self.ln_x is not None:
            self.k_k.fill_(self.CONSTANTS["removal_key_scale_init"])
            self.k_a.fill_(1.0)
            self.ln_x.weight.fill_(1.0)
            self.ln_x.bias.zero_()

    def mix(
        self,
        x_BTD: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        first: FirstValues | None = None,
        state: MixerState | None = None,
        keep_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = False,
    ) -> MixerOutput:
        """See `radlads.model.mixers.shared.mixer.Mixer.mix`."""
        r, k, v = self.project(x_BTD, rope if self.options.rope else None)
        k, v = self.repeat(k), self.repeat(v)
        if self.v0 is None:
            first = FirstValues(v=v)
        else:
            if first is None or first.v is None:
                raise ValueError(f"layer {self.layer} needs the first recurrent layer's values")
            v = v + (first.v - v) * self.heads(torch.sigmoid(self.v0 + x_BTD @ self.v1 @ self.v2))

        iclr = self.heads(torch.sigmoid((self.a0 + x_BTD @ self.a1 @ self.a2).float()))
        speed = torch.sigmoid(self.w0.float() + (torch.tanh(x_BTD @ self.w1) @ self.w2).float())
        log_decay = self.heads(-self.CONSTANTS["decay_scale"] * speed)
        if self.ln_x is None:
            kk = unit_keys(k)
            k = k * (iclr - torch.expm1(log_decay)).to(k.dtype)
        else:
            kk = unit_keys(k * self.heads(self.k_k))
            k = k * (1 + (iclr - 1) * self.heads(self.k_a)).to(k.dtype)

        out, wkv = run_wkv7(
            r,
            log_decay,
            k,
            v,
            kk,
            iclr.to(k.dtype),
            state=state,
            keep_BT=keep_BT,
            cu_seqlens=cu_seqlens,
            output_state=output_state,
            training=self.training,
        )
        if self.ln_x is None:
            out = out * self.shape.head_dim**-0.5
        else:
            out = head_group_norm(out, self.ln_x.weight, self.ln_x.bias, self.ln_x.eps)
        gate = torch.sigmoid(x_BTD @ self.g1) @ self.g2
        out = self.o_proj(out.flatten(-2) * gate)
        return MixerOutput(out, first, None if wkv is None else MixerState(wkv))
