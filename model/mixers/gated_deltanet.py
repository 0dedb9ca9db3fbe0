"""Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464) in place of attention: a delta rule, one decay a head.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input. All maps are per token.

    q = rope(norm(conv(x q_proj)))                  [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(rope(norm(conv(x k_proj))))          [H,K]      repeat: kv head g serves H/G query heads in a row
    v = repeat(conv(x v_proj))                      [H,K]      conv: Σ_n c_n ⊙ x_{t-n}, n < W (short_conv alone)
    q, k = q / ‖q‖, k / ‖k‖
    log_decay = -exp(A_log) softplus(x a_proj + dt_bias)       [H]      decay = exp(log_decay) in (0, 1)
    beta = σ(x b_proj)                              [H]

    S_t = decay_t (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ      o_t = q_tᵀ S_t · K^(-1/2)      S [K,V] fp32
    y = o / rms(o) ⊙ o_norm                         [H,K]      over each head alone; norm: false leaves o
    out = (y ⊙ g) o_proj                            [D]        g = σ(x g1) g2 (low_rank), silu(x g_proj) (full), 1

Published, and so in Qwen3-Next and flash-linear-attention: no rotary positions, a convolution of width 4 with silu
after q, k and v, and the full gate. A converted layer has its teacher's q, k and v, which were trained with rotary
positions and without convolution or silu; so here positions stay on, the convolution is an option without silu that
starts as the identity, and the gate is that of RADLADS (2505.03005), a quarter of the parameters, which calibration can
fit. With short_conv the state holds the last W - 1 inputs of the convolution beside S.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from radlads.kernels.gated_delta import gated_delta, gated_delta_step
from radlads.model.mixers.shared.mixer import (
    AttentionShape,
    FirstValues,
    HeadNorm,
    MixerOutput,
    MixerState,
    init_low_rank_out,
    unit_keys,
)
from radlads.model.mixers.shared.mixer import (
    Mixer as BaseMixer,
)
from radlads.model.mixers.shared.options import INITIAL, MixerOptions, Rank
from radlads.model.mixers.shared.recurrence import run_recurrence
from radlads.model.mixers.shared.token_shift import previous_tokens

# Time steps of the first and the last head at the start; Mamba-2 and Gated DeltaNet draw theirs from this range.
_SLOWEST, _FASTEST = 1e-3, 1e-1


class Options(MixerOptions):
    """Choices of gated_deltanet. A rank of None is RADLADS's formula, of D."""

    RANKS: ClassVar[dict[str, Rank]] = {"gate_rank": Rank(0.8, 0.6)}

    rope: bool = True
    """Rotary positions on q and k; the teacher's own frequencies. Published: none."""
    gate: Literal["low_rank", "full", "none"] = "low_rank"
    """full: as published."""
    norm: bool = True
    """RMSNorm over each head's output, as published."""
    short_conv: Literal[0, 2, 3, 4] = 0
    """Width of the causal convolution over each channel of q, k and v; 0: none. Published: 4."""
    decay_shift: Annotated[float, INITIAL] = 0.0
    """Added to dt_bias, whose initial decay is slow. Positive: faster decay at first."""
    gate_rank: int | None = Field(default=None, ge=1)
    """Of the gate's low_rank form."""

    def resolve(self, hidden_size: int, width: int) -> Self:
        """Ranks by D, and not by A."""
        return self.with_ranks(hidden_size)


class Mixer(BaseMixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {"output_scale": "head_dim^-0.5"}
    CALIBRATED: ClassVar[dict[str, str]] = {"decay": "dt_bias", "gate": "g2"}
    PARTS: ClassVar = {
        "decay_base": ("A_log", "dt_bias"),
        "decay": ("A_log", "dt_bias", "a_proj"),
        "token_shift": ("conv",),
    }

    def __init__(self, shape: AttentionShape, options: Any, *, layer: int, num_layers: int, first: bool) -> None:
        """options: resolved, attributes as in `Options`. first: makes no difference here."""
        super().__init__(shape, layer, num_layers)
        self.options = options
        D, A, H = shape.hidden_size, shape.width, shape.num_heads
        self.a_proj = nn.Linear(D, H, bias=False)
        self.b_proj = nn.Linear(D, H, bias=False)
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.o_norm = HeadNorm(shape.head_dim, shape.norm_eps) if options.norm else None
        if options.gate == "full":
            self.g_proj = nn.Linear(D, A, bias=False)
        elif options.gate == "low_rank":
            self.g1 = nn.Parameter(torch.empty(D, options.gate_rank))
            self.g2 = nn.Parameter(torch.empty(options.gate_rank, A))
        if options.short_conv:
            channels = A + 2 * shape.num_kv_heads * shape.head_dim
            self.conv = nn.Parameter(torch.empty(options.short_conv, channels))
        self.start()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A converted layer's start: half-lives from 7 to 700 tokens (decays 0.905 to 0.999, the range in which
        RAD-RWKV7 starts), beta one half, a small random gate, an identity convolution."""
        step = torch.logspace(0, 1, self.shape.num_heads, base=_FASTEST / _SLOWEST, device=self.dt_bias.device)
        self.dt_bias.copy_(torch.log(torch.expm1(step * _SLOWEST)) + self.options.decay_shift)
        self.A_log.zero_()
        self.a_proj.weight.zero_()
        self.b_proj.weight.zero_()
        if self.options.gate == "full":
            self.g_proj.weight.normal_(std=self.shape.hidden_size**-0.5)
        elif self.options.gate == "low_rank":
            self.g1.zero_()
            init_low_rank_out(self.g2)
        if self.options.short_conv:
            self.conv.zero_()
            self.conv[-1].fill_(1.0)

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
        row_part: Any = None,
    ) -> MixerOutput:
        """See `radlads.model.mixers.shared.mixer.Mixer.mix`."""
        q, output_gate = self.split_gate(self.q_proj(x_BTD))
        qkv, recent = (q, self.k_proj(x_BTD), self.v_proj(x_BTD)), None
        if self.options.short_conv:
            qkv, recent = self._convolve(qkv, state, keep_BT=keep_BT, cu_seqlens=cu_seqlens, row_part=row_part)
        q, k, v = self.to_heads(*qkv, rope if self.options.rope else None)
        q, k, v = unit_keys(q), self.repeat(unit_keys(k)), self.repeat(v)
        speed = nn.functional.softplus(self.a_proj(x_BTD).float() + self.dt_bias.float())
        log_decay, beta = -self.A_log.float().exp() * speed, torch.sigmoid(self.b_proj(x_BTD).float())
        if keep_BT is not None:
            keep = keep_BT[..., None].to(beta.dtype)
            log_decay, beta = log_decay * keep, beta * keep

        o, memory = run_recurrence(
            gated_delta,
            gated_delta_step,
            (q, k, v, log_decay, beta),
            state=state,
            cu_seqlens=cu_seqlens,
            output_state=output_state,
            training=self.training,
            row_part=row_part,
        )
        o = o * self.shape.head_dim**-0.5
        y = (o if self.o_norm is None else self.o_norm(o)).flatten(-2)
        if self.options.gate == "full":
            y = y * nn.functional.silu(self.g_proj(x_BTD))
        elif self.options.gate == "low_rank":
            y = y * (torch.sigmoid(x_BTD @ self.g1) @ self.g2)
        return MixerOutput(
            self.finish(y, output_gate), FirstValues(), None if memory is None else MixerState(memory, recent)
        )

    def _convolve(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        state: MixerState | None,
        **given: Any,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k and v, each channel convolved with the tokens before, and the last W - 1 inputs [B,W-1,A+2·G·K].
        given: for `previous_tokens`."""
        earlier = torch.cat(qkv, dim=-1)
        out, recent = earlier * self.conv[-1], []
        for n in range(1, self.options.short_conv):
            last = None if state is None else state.shift[:, n - 1]
            earlier, last = previous_tokens(earlier, last_BD=last, **given)
            out = out + earlier * self.conv[-1 - n]
            recent.append(last)
        return out.split([x.shape[-1] for x in qkv], dim=-1), torch.stack(recent, dim=1)
