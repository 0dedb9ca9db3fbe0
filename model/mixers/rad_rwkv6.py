"""RAD-RWKV6, the first mixer of RADLADS (arXiv 2505.03005, appendix A.1; QRWKV6, "Qwerky6").

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
x [B,T,D] is the layer's normed input, d_t = x_{t-1} - x_t (x before the first token: 0). Per token:

    u = x + d ⊙ μ_x                                 [D]        μ: time_maa_x, time_maa_r, ...
    m_r, m_k, m_v, m_w, m_g = tanh(u W1) W2         [D] each   W1 [D,5R], W2 [5,R,D]: time_maa_w1, time_maa_w2
    x_r = x + d ⊙ (μ_r + m_r),  likewise x_k, x_v, x_w, x_g    token shift that depends on the data
    r = rope(norm(x_r q_proj))                      [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = repeat(rope(norm(x_k k_proj)))              [H,K]      repeat: kv head g serves H/G query heads in a row
    v = repeat(x_v v_proj)                          [H,K]
    log_decay = max(-exp(time_decay + tanh(x_w time_decay_w1) time_decay_w2), -5)    [A]    decay in [0.0067, 1)
    k = k ⊙ (1 - decay)                                        balanced; groupnorm: k as it is
    S_t = diag(decay_t) S_{t-1} + k_t v_tᵀ      y_t = r_tᵀ S_t · K^(-1/2)        S [K,V] fp32, per head
    y = GroupNorm over H groups (y), eps K·1e-5                groupnorm alone
    out = (y ⊙ g) o_proj                            [D]        g = σ(x_g gate) (full), σ(x_g g1) g2 (low_rank), 1 (none)

Against stock RWKV-6: the current token is decayed like the others (no bonus, no off-by-one), keys are scaled so that
the state stays bounded without a norm, and decay has a floor. `groupnorm` is the paper's ablation, unstable in large
models. The paper also applies K^(-1/2) to the keys; its code, like this one, applies it once. The state holds the last
input beside S.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from radlads.kernels.wkv6 import wkv6, wkv6_step
from radlads.model.mixers.shared.mixer import (
    AttentionShape,
    FirstValues,
    MixerOutput,
    MixerState,
    head_group_norm,
    init_low_rank_out,
)
from radlads.model.mixers.shared.mixer import (
    Mixer as BaseMixer,
)
from radlads.model.mixers.shared.options import INITIAL, MixerOptions, Rank
from radlads.model.mixers.shared.recurrence import run_recurrence
from radlads.model.mixers.shared.token_shift import previous_tokens

_BRANCHES = ("r", "k", "v", "w", "g")


class Options(MixerOptions):
    """Choices of rad_rwkv6. A rank of None is the published formula, of D."""

    RANKS: ClassVar[dict[str, Rank]] = {
        "decay_rank": Rank(0.5, 1.8),
        "shift_rank": Rank(0.5, 1.8),
        "gate_rank": Rank(0.8, 0.6),
    }

    form: Literal["balanced", "groupnorm"] = "balanced"
    """balanced: keys scaled so that the state stays bounded. groupnorm: a GroupNorm instead."""
    gate: Literal["full", "low_rank", "none"] = "full"
    """Of the output: one matrix, two of low rank, or none."""
    token_shift: bool = True
    """Mix each token with the one before it."""
    rope: bool = False
    """Published: no rotary positions. True: on r and k, before the repeat; the teacher's own frequencies."""
    decay_shift: Annotated[float, INITIAL] = 0.0
    """Added to time_decay, whose published initial decay is slow (0.69 to 0.9975). Positive: faster decay at first."""
    decay_rank: int | None = Field(default=None, ge=1)
    shift_rank: int | None = Field(default=None, ge=1)
    gate_rank: int | None = Field(default=None, ge=1)
    """Of the gate's low_rank form."""

    def resolve(self, hidden_size: int, width: int) -> Self:
        """Ranks by D, as published, and not by A."""
        return self.with_ranks(hidden_size)


class Mixer(BaseMixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {
        "least_log_decay": -5.0,
        "group_norm_eps_per_channel": 1e-5,
        "output_scale": "head_dim^-0.5",
    }
    CALIBRATED: ClassVar[dict[str, str]] = BaseMixer.CALIBRATED | {"decay": "time_decay"}
    PARTS: ClassVar = {
        "decay_base": ("time_decay",),
        "decay": ("time_decay", "time_decay_w1", "time_decay_w2"),
        "token_shift": ("time_maa_*",),
    }

    def __init__(self, shape: AttentionShape, options: Any, *, layer: int, num_layers: int, first: bool) -> None:
        """See the base's; `first` makes no difference here."""
        super().__init__(shape, layer, num_layers)
        self.options = options
        D, A = shape.hidden_size, shape.width
        if options.token_shift:
            for name in ("x", *_BRANCHES):
                self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, D)))
            self.time_maa_w1 = nn.Parameter(torch.empty(D, len(_BRANCHES) * options.shift_rank))
            self.time_maa_w2 = nn.Parameter(torch.empty(len(_BRANCHES), options.shift_rank, D))
        self.time_decay = nn.Parameter(torch.empty(1, 1, A))
        self.time_decay_w1 = nn.Parameter(torch.empty(D, options.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(options.decay_rank, A))
        if options.gate == "full":
            self.gate = nn.Linear(D, A, bias=False)
        elif options.gate == "low_rank":
            self.g1 = nn.Parameter(torch.empty(D, options.gate_rank))
            self.g2 = nn.Parameter(torch.empty(options.gate_rank, A))
        self.ln_x: nn.Module | None = None
        if options.form == "groupnorm":
            eps = shape.head_dim * self.CONSTANTS["group_norm_eps_per_channel"]
            self.ln_x = nn.GroupNorm(shape.num_heads, A, eps=eps)
        self.start()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start: the token shift is the identity, the gate is one half everywhere (full)."""
        A = self.shape.width
        if self.options.token_shift:
            for name in _BRANCHES:
                getattr(self, f"time_maa_{name}").zero_()
            self.time_maa_x.fill_(1.0)
            self.time_maa_w1.zero_()
            self.time_maa_w2.uniform_(-0.01, 0.01)
        channel = torch.arange(A, dtype=torch.float32, device=self.time_decay.device) / max(1, A - 1)
        rising = -6 + 5 * channel ** (0.7 + 1.3 * self.depth)
        self.time_decay.copy_((rising + self.options.decay_shift).view(1, 1, A))
        self.time_decay_w1.zero_()
        self.time_decay_w2.uniform_(-0.01, 0.01)
        if self.options.gate == "full":
            self.gate.weight.zero_()
        elif self.options.gate == "low_rank":
            self.g1.zero_()
            init_low_rank_out(self.g2)
        if self.ln_x is not None:
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
        row_part: Any = None,
    ) -> MixerOutput:
        """See `radlads.model.mixers.shared.mixer.Mixer.mix`."""
        (x_r, x_k, x_v, x_w, x_g), last = self._shift(
            x_BTD, state, keep_BT=keep_BT, cu_seqlens=cu_seqlens, row_part=row_part
        )
        r, k, v, gate = self.project(x_r, rope if self.options.rope else None, x_k_BTD=x_k, x_v_BTD=x_v)
        k, v = self.repeat(k), self.repeat(v)
        speed = self.time_decay.float() + (torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2).float()
        log_decay = self.heads((-torch.exp(speed)).clamp(min=self.CONSTANTS["least_log_decay"]))
        if self.ln_x is None:
            k = k * -torch.expm1(log_decay).to(k.dtype)
        if keep_BT is not None:
            keep = keep_BT[..., None, None].to(k.dtype)
            log_decay, k = log_decay * keep, k * keep

        y, wkv = run_recurrence(
            wkv6,
            wkv6_step,
            (r, log_decay, k, v),
            state=state,
            cu_seqlens=cu_seqlens,
            output_state=output_state,
            training=self.training,
            row_part=row_part,
        )
        y = y * self.shape.head_dim**-0.5
        if self.ln_x is not None:
            y = head_group_norm(y, self.ln_x.weight, self.ln_x.bias, self.ln_x.eps)
        y = y.flatten(-2)
        if self.options.gate == "full":
            y = y * torch.sigmoid(self.gate(x_g))
        elif self.options.gate == "low_rank":
            y = y * (torch.sigmoid(x_g @ self.g1) @ self.g2)
        return MixerOutput(self.finish(y, gate), FirstValues(), None if wkv is None else MixerState(wkv, last))

    def _shift(self, x_BTD: Tensor, state: MixerState | None, **given: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The inputs of r, k, v, decay and gate, and the last token's x [B,D]. given: for `previous_tokens`."""
        if not self.options.token_shift:
            return (x_BTD,) * len(_BRANCHES), None
        last = None if state is None else state.shift
        previous, last = previous_tokens(x_BTD, last_BD=last, **given)
        change = previous - x_BTD
        inner = torch.tanh((x_BTD + change * self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (len(_BRANCHES), -1))
        moves = torch.einsum("btnr,nrd->nbtd", inner, self.time_maa_w2)
        names = [f"time_maa_{name}" for name in _BRANCHES]
        shifted = (x_BTD + change * (getattr(self, n) + move) for n, move in zip(names, moves, strict=True))
        return tuple(shifted), last
