"""The common form of the RWKV-7 mixers that replace attention: a `Design` selects the terms that a variant has.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K, R low rank.
Needs torch only: an exported model carries this file. In the order of computation:

    x_r = x + d ⊙ μ_r,  d_t = x_{t-1} - x_t         [D]        token shift; likewise x_w, x_k, x_v, x_a, x_g; else all x
    r, k, v = x_r q_proj, x_k k_proj, x_v v_proj               [H,K], [G,K], [G,K]; the teacher's q/k norms, then RoPE
    v = v + (v_first - v) ⊙ σ(v0 + x_v v1 v2)                  first values; likewise k with k0, k1, k2: first keys;
                                                               before the repeat (level kv) or after it (level heads)
    k, v = repeat(k), repeat(v)                     [H,K]      kv head g serves H/G query heads in a row
    v = v + value_lora_scale · x_v v1 v2                       low-rank values, without a first layer
    w_raw = log σ(w0 + tanh(x_w w1) w2) - decay_offset   [A]   log_decay = -e^w_raw, decay = e^log_decay
    iclr = σ(a0 + x_a a1 a2)                        [A]
    kk, k = unit(k ⊙ k_k), k ⊙ (1 + (iclr - 1) ⊙ k_a)          stock keys; otherwise
    kk, k = unit(k), k ⊙ (1 - decay + iclr)                    key scaling "decay"
    kk, k = unit(k), k ⊙ (1 - w_raw + iclr)                    key scaling "log_log_decay"
    S_t = diag(decay_t) S_{t-1} - (kk_t ⊙ iclr_t)(kk_tᵀ S_{t-1}) + k_t v_tᵀ     y_t = r_tᵀ S_t      S [K,V] fp32
    y = GroupNorm_H(y)   or   y · K^(-1/2)   or   y
    y = y + (Σ_K r ⊙ k ⊙ r_k) v                                bonus, with the scaled k
    y = y ⊙ g,   g = σ(x_g g1) g2   or   1 + σ(x_g g1) g2      [A]
    out = y o_proj                                  [D]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from radlads.kernels.inference import few_rows_apply
from radlads.kernels.mixer_ops import (
    AddedValues,
    Bonus,
    GroupNorm,
    Residual,
    StockKeys,
    wkv7_delta_operands,
    wkv7_finish,
    wkv7_operands,
)
from radlads.model.mixers.shared.mixer import (
    AttentionShape,
    FirstValues,
    Mixer,
    MixerOutput,
    MixerState,
    init_low_rank_out,
    low_rank,
    repeat_kv,
)
from radlads.model.mixers.shared.products import (
    Terms,
    first_factors,
    low_rank_terms,
    project_together,
    reads_in_16_bits,
    second_factors,
)
from radlads.model.mixers.shared.recurrence import is_step
from radlads.model.mixers.shared.recurrence_wkv7 import run_wkv7
from radlads.model.mixers.shared.starts import head_ramps, rising_decay, start_gate_at_one
from radlads.model.mixers.shared.token_shift import previous_tokens


@dataclass(frozen=True)
class Design:
    """The terms that a variant has; the module's docstring has their equations."""

    decay_offset: float
    key_scaling: Literal["k_a", "decay", "log_log_decay"]
    """k_a: stock keys, with k_k and k_a."""
    first_values: Literal["none", "heads", "kv"] = "none"
    first_keys: bool = False
    """Only at the level kv."""
    first_values_gradient: bool = True
    """Whether deeper layers train the first one through its values and keys; the function is the same."""
    value_lora_scale: float | None = None
    """Excludes first values: both use the names v1 and v2."""
    group_norm_eps: float | None = None
    output_scale: bool = False
    """y · K^(-1/2)."""
    bonus: bool = False
    gate: Literal["none", "product", "one_plus"] = "none"
    token_shift: bool = False


class Branches(NamedTuple):
    """The inputs [B,T,D] of the six branches; all the same without a token shift."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    g: Tensor


class Rwkv7Mixer(Mixer):
    """A mixer of the RWKV-7 family. A subclass gives its design, and how its parameters start."""

    DRAW_ORDER: ClassVar[str] = "wavkg"
    """Low-rank maps in the order in which their initial values are drawn: the values for a seed depend on it."""
    decay_dtype: torch.dtype = torch.float32
    """Of the log decay that the recurrence is given; training may round it to 16 bits, as reading a prompt in 16 bits
    on a GPU does."""

    def __init__(self, shape: AttentionShape, options: Any, *, layer: int, num_layers: int, first: bool) -> None:
        """See `Mixer`."""
        super().__init__(shape, layer, num_layers)
        self.options = options
        self.design = design = self.design_of(options, shape)
        D, A, kv = shape.hidden_size, shape.width, shape.num_kv_heads * shape.head_dim
        self.w0, self.w1, self.w2 = low_rank(D, options.decay_rank, A)
        self.a0, self.a1, self.a2 = low_rank(D, options.iclr_rank, A)
        self.v0: Tensor | None = None
        self.k0: Tensor | None = None
        if design.first_values != "none" and not first:
            self.v0, self.v1, self.v2 = low_rank(D, options.value_rank, kv if design.first_values == "kv" else A)
            if design.first_keys:
                self.k0, self.k1, self.k2 = low_rank(D, options.key_rank, kv)
        if design.value_lora_scale is not None:
            _, self.v1, self.v2 = low_rank(D, options.value_rank, A)
        if design.gate != "none":
            _, self.g1, self.g2 = low_rank(D, options.gate_rank, A)
        if design.key_scaling == "k_a":
            self.k_k = nn.Parameter(torch.empty(1, 1, A))
            self.k_a = nn.Parameter(torch.empty(1, 1, A))
        if design.bonus:
            self.r_k = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim))
        if design.token_shift:
            for name in Branches._fields:
                if name != "g" or design.gate != "none":
                    self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, D)))
        self.ln_x: nn.Module | None = None
        if design.group_norm_eps is not None:
            self.ln_x = nn.GroupNorm(shape.num_heads, A, eps=design.group_norm_eps)
        self.start()

    @classmethod
    def design_of(cls, options: Any, shape: AttentionShape) -> Design:
        """The variant's terms under these options, in a layer of this shape."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values common to the family; a variant continues with its own."""
        for name in self.DRAW_ORDER:
            if hasattr(self, f"{name}1"):
                getattr(self, f"{name}1").zero_()
                init_low_rank_out(getattr(self, f"{name}2"))
        if self.ln_x is not None:
            self.ln_x.weight.fill_(1.0)
            self.ln_x.bias.zero_()

    def start_as_stock(self) -> None:
        """Official RWKV-7's start of decay, learning rate, keys and bonus; values as `value_residual_init` says."""
        rising = rising_decay(self.shape.width, self.depth, self.w0.device)
        self.w0.copy_((rising + self.options.decay_shift).view(1, 1, -1))
        self.a0.zero_()
        if self.design.key_scaling == "k_a":
            self.k_k.fill_(0.85)
            self.k_a.fill_(1.0)
        if self.design.bonus:
            self.r_k.zero_()
        if self.v0 is not None:
            self.v0.fill_(self.options.value_residual_init)

    def start_on_ramps(self) -> None:
        """The start of decay and learning rate in hxa079 and later; the gate as `gate_init` says."""
        ramps = head_ramps(self.shape.num_heads, self.shape.head_dim, self.depth, self.w0.device)
        self.w0.copy_((ramps.slow + self.options.decay_shift).view(1, 1, -1))
        self.a0.copy_((-0.19 + 0.3 * ramps.zigzag + 0.4 * ramps.line).view(1, 1, -1))
        self.start_gate()

    def start_gate(self) -> None:
        """Random initial values of the gate, unless `gate_init` sets the gate to one."""
        if self.design.gate == "product" and self.options.gate_init == "identity":
            start_gate_at_one(self.g2)

    def _branches(self, x_BTD: Tensor, state: MixerState | None, **given: Any) -> tuple[Branches, Tensor | None]:
        """The input of each branch, and the last token's x [B,D] for the token shift. given: for `previous_tokens`."""
        if not self.design.token_shift:
            return Branches(*[x_BTD] * 6), None
        last = None if state is None else state.shift
        previous, last = previous_tokens(x_BTD, last_BD=last, **given)
        change = previous - x_BTD
        shifts = (getattr(self, f"x_{name}", None) for name in Branches._fields)
        return Branches(*(x_BTD if shift is None else x_BTD + change * shift for shift in shifts)), last

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
        x, shift = self._branches(x_BTD, state, keep_BT=keep_BT, cu_seqlens=cu_seqlens, row_part=row_part)
        r, k, v, gate = self.project(x.r, rope if self.options.rope else None, x_k_BTD=x.k, x_v_BTD=x.v)
        call: dict[str, Any] = {"state": state, "keep_BT": keep_BT, "cu_seqlens": cu_seqlens}
        call |= {"output_state": output_state, "row_part": row_part}
        given = first or FirstValues()
        if few_rows_apply(x_BTD):
            out, values, wkv = self._recur(r, k, v, gate, given, low_rank_terms(self, x), **call)
        else:
            out, values, wkv = self.recur(r, k, v, gate, *given, *first_factors(self, x), **call)
        first = _first_values(self.design, k, v, values) if self.v0 is None else first
        return MixerOutput(out, first, None if wkv is None else MixerState(wkv, shift))

    def recur(
        self,
        r_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        gate_BTA: Tensor | None,
        first_v: Tensor | None,
        first_k: Tensor | None,
        *low_BTR: Tensor | None,
        **call: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From what the wide projections give to the output [B,T,D], with the values [B,T,H,V] and the last state: all
        that costs little arithmetic for the memory that it keeps, so that training may compute it twice.

        gate: the teacher's own. first_v, first_k: FirstValues. low: products with the first factor of w, a, v, k, g;
        None for those that the variant lacks. call: state, keep_BT, cu_seqlens, output_state, row_part, as of
        `mix`.
        """
        first, low = FirstValues(first_v, first_k), second_factors(self, low_BTR)
        return self._recur(r_BTHK, k_BTGK, v_BTGK, gate_BTA, first, low, **call)

    def _recur(
        self,
        r_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        gate_BTA: Tensor | None,
        first: FirstValues,
        low: Terms,
        **call: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        design, one_token = self.design, is_step(r_BTHK, call["state"], training=self.training)
        operands = (wkv7_delta_operands if one_token else wkv7_operands)(
            k_BTGK,
            v_BTGK,
            values=self._values(low.v, first),
            keys=None if self.k0 is None else Residual(first.k, low.k, self.k0),
            a_low_BTA=low.a,
            w_low_BTA=low.w,
            w0_A=self.w0,
            a0_A=self.a0,
            stock=StockKeys(self.k_k, self.k_a) if design.key_scaling == "k_a" else None,
            decay_offset=design.decay_offset,
            log_log=design.key_scaling == "log_log_decay",
            decay_dtype=k_BTGK.dtype if reads_in_16_bits(k_BTGK, one_token) else self.decay_dtype,
        )
        y, wkv = run_wkv7(r_BTHK, operands, training=self.training, **call)
        y = wkv7_finish(
            y,
            norm=None if self.ln_x is None else GroupNorm(self.ln_x.weight, self.ln_x.bias, self.ln_x.eps),
            scale=self.shape.head_dim**-0.5 if design.output_scale else 1.0,
            bonus=Bonus(r_BTHK, operands.k, operands.v, self.r_k) if design.bonus else None,
            gate_BTA=low.g,
            gate_base=1.0 if design.gate == "one_plus" else 0.0,
            out_gate_BTA=gate_BTA,
        )
        return project_together([y], [self.o_proj])[0], operands.v, wkv

    def _values(self, low: Tensor | None, first: FirstValues) -> Residual | AddedValues | None:
        """What is mixed into a layer's values."""
        if self.design.value_lora_scale is not None:
            return AddedValues(low, self.design.value_lora_scale)
        if self.v0 is None:
            return None
        if first.v is None or (self.design.first_keys and first.k is None):
            raise ValueError(f"layer {self.layer} needs the first recurrent layer's values")
        return Residual(first.v, low, self.v0)

    @classmethod
    def first_values_of(
        cls, options: Any, shape: AttentionShape, project: Callable[[bool], tuple[Tensor, Tensor]]
    ) -> FirstValues:
        """See `radlads.model.mixers.shared.mixer.Mixer.first_values_of`."""
        design = cls.design_of(options, shape)
        if design.first_values == "none":
            return FirstValues()
        k, v = project(options.rope)
        return _first_values(design, k, v, repeat_kv(v, shape.num_heads // shape.num_kv_heads))


def _first_values(design: Design, k_BTGK: Tensor, v_BTGK: Tensor, v_BTHK: Tensor) -> FirstValues:
    """What the first layer hands to the others."""
    if design.first_values == "none":
        return FirstValues()
    mine = FirstValues(v_BTHK if design.first_values == "heads" else v_BTGK, k_BTGK if design.first_keys else None)
    return mine if design.first_values_gradient else FirstValues(*(None if z is None else z.detach() for z in mine))
