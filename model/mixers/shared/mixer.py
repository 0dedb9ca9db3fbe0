"""Common parts of mixers: low-rank maps, GQA repeat, RoPE, per-head norms, the first-layer residual, the state.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key dim per head, V value dim per head (= K),
A = H·K, R low rank, N packed sequences. Needs torch only: an exported model carries this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from radlads.kernels.mixer_ops import rotate_heads
from radlads.model.mixers.shared.attention_shape import AttentionShape
from radlads.model.mixers.shared.products import project_together


class FirstValues(NamedTuple):
    """Outputs of the first layer for the deeper ones, passed as values so that the gradient reaches it.

    [B,T,H,V] and [B,T,H,K] where a variant mixes them after the repeat, [B,T,G,V] and [B,T,G,K] where before.
    """

    v: Tensor | None = None
    k: Tensor | None = None


class MixerState(NamedTuple):
    """Recurrent memory of one layer between calls."""

    recurrent: Tensor
    """[B,H,K,V], fp32; of sliding_window, keys and values of the tokens that it sees."""
    shift: Tensor | None = None
    """The last inputs, for variants that mix neighbours: [B,D] of a token shift, [B,W-1,·] of a short convolution."""
    seen: Tensor | None = None
    """[B] int64, the tokens read so far, for variants that count them."""


class MixerOutput(NamedTuple):
    """Result of a mixer: its output [B,T,D], the values for deeper layers, its state if requested."""

    out: Tensor
    first: FirstValues
    state: MixerState | None


@dataclass
class MixerContext:
    """Data shared by the mixers of one forward pass; decoder layers pass it to their attention as `mixer_context`."""

    keep: Tensor | None = None
    """Bool [B,T], False at padding."""
    cu_seqlens: Tensor | None = None
    """int64 [N+1], document bounds in the flattened [B·T], row bounds included."""
    attention_rope: bool = False
    """Whether the layers that stayed softmax attention rotate their queries and keys."""
    score_scale: Tensor | None = None
    """[1 or B,T], by which those multiply the scores of each query; None: not at all."""
    faded: Any = None
    """Rotary positions that those use although `attention_rope` is off (`FadedPositions`), in training; None: none."""
    cached: bool = False
    """Whether the pass continues from a cache, or fills one."""
    row_part: Any = None
    """In training by several ranks that share rows: this rank's part (`before` and `run`); None elsewhere."""
    first: FirstValues | None = None
    """Set by the first layer, mixer or attention: tensors of its graph, so that gradients of deeper layers reach it."""


class Mixer(nn.Module):
    """Base of the recurrent replacements of attention: the projections under the teacher's names, and its q/k norms.

    A decoder layer calls it as it calls the attention that it replaces; `mix` is what a variant defines. A variant is
    made as `Mixer(shape, options, layer=, num_layers=, first=)`. options: resolved, attributes as in the variant's
    `Options`; those that say how parameters start may be missing on the meta device. first: whether this is the
    layer that hands on first values.
    """

    CONSTANTS: ClassVar[dict[str, float | str]] = {}
    """Constants of the variant's function that are not options: written into the exported config and compared on load.
    Initial values of parameters are not among them."""
    CALIBRATED: ClassVar[dict[str, str]] = {"value": "v0", "iclr": "a0", "decay": "w0", "gate": "g2", "norm": "ln_x"}
    """Parameters that calibration (model/training/calibration.py) may change: part → attribute; absent or None:
    none."""
    PARTS: ClassVar = {"decay_base": ("w0",), "decay": ("w0", "w1", "w2"), "token_shift": ("x_?",)}
    """Parts that recipes name (train_only, decay_base_rate) → patterns of names, which mean the same in any variant."""

    RECURRENT: ClassVar[bool] = True
    """Whether a state sums up all tokens, so that the layer is linear attention."""
    SHARES_ROWS_BY_HEADS: ClassVar[bool] = False
    """Whether ranks that share rows exchange heads for tokens here, so that their number must divide the heads."""

    def __init__(self, shape: AttentionShape, layer: int, num_layers: int) -> None:
        super().__init__()
        self.shape, self.layer, self.num_layers = shape, layer, num_layers
        self.depth = layer / max(1, num_layers - 1)
        D, A, kv = shape.hidden_size, shape.width, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(D, 2 * A if shape.output_gate else A, bias=shape.q_bias)
        self.k_proj = nn.Linear(D, kv, bias=shape.k_bias)
        self.v_proj = nn.Linear(D, kv, bias=shape.v_bias)
        self.o_proj = nn.Linear(A, D, bias=shape.o_bias)
        norm, per_head = shape.norm or HeadNorm, not shape.norm_all_heads
        self.q_norm = norm(shape.head_dim if per_head else A, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = norm(shape.head_dim if per_head else kv, shape.norm_eps) if shape.qk_norm else None

    @classmethod
    def first_values_of(
        cls, options: Any, shape: AttentionShape, project: Callable[[bool], tuple[Tensor, Tensor]]
    ) -> FirstValues:
        """What the first layer hands to the others where it stays softmax attention. project: whether keys are rotated
        → its keys and values [B,T,G,K]."""
        return FirstValues()

    def start(self) -> None:
        """Give the parameters their initial values; on the meta device, where models are loaded, there are none."""
        if not self.q_proj.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The variant's initial values, for parameters that do not come from the teacher."""
        raise NotImplementedError

    def project(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        *,
        x_k_BTD: Tensor | None = None,
        x_v_BTD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`(r [B,T,H,K], k [B,T,G,K], v [B,T,G,V], gate)`: projected, normed, rotated and scaled as the teacher does.

        gate: of the output, for `finish`; None without.
        rope: None where the variant does without. x_k_BTD, x_v_BTD: inputs of keys and values, where a token shift
        makes them differ from those of r.
        """
        x_k, x_v = (x_BTD if x is None else x for x in (x_k_BTD, x_v_BTD))
        q, k, v = project_together((x_BTD, x_k, x_v), (self.q_proj, self.k_proj, self.v_proj))
        r, gate = self.split_gate(q)
        return (*self.to_heads(r, k, v, rope), gate)

    def split_gate(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """An output of q_proj as queries [B,T,A] and the output's gate [B,T,A], before its sigmoid; None without."""
        if not self.shape.output_gate:
            return q, None
        r, gate = q.unflatten(-1, (self.shape.num_heads, 2, -1)).unbind(-2)
        return r.flatten(-2), gate.flatten(-2)

    def finish(self, y_BTA: Tensor, gate_BTA: Tensor | None) -> Tensor:
        """The output [B,T,D]: gated as the teacher's attention gates its own, and projected."""
        return project_together([y_BTA if gate_BTA is None else y_BTA * torch.sigmoid(gate_BTA)], [self.o_proj])[0]

    def to_heads(self, r_BTA: Tensor, k_BTA: Tensor, v_BTA: Tensor, rope: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the projections as `project` returns them."""
        return to_heads(self.shape, self.q_norm, self.k_norm, r_BTA, k_BTA, v_BTA, rope)

    def repeat(self, x_BTGK: Tensor) -> Tensor:
        return repeat_kv(x_BTGK, self.shape.num_heads // self.shape.num_kv_heads)

    def heads(self, x_BTA: Tensor) -> Tensor:
        """[B,T,A] -> [B,T,H,K]."""
        return x_BTA.unflatten(-1, (self.shape.num_heads, self.shape.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        cache: Any = None,
        mixer_context: MixerContext,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """An attention module's call: `(output [B,T,D], no attention weights)`.

        hidden_states: [B,T,D]. cache: the name of past_key_values from transformers 5.24 on. mixer_context: shared by
        the pass's layers, and updated. The other arguments are for attention only. Raises RuntimeError where the cache
        of the pass does not arrive.
        """
        cache = past_key_values if cache is None else cache
        if mixer_context.cached != (cache is not None):
            raise RuntimeError(
                f"layer {self.layer} was {'not ' * mixer_context.cached}handed a cache, unlike the model: to generate "
                "while gradient checkpointing is on, call eval() first; else this transformers release is not supported"
            )
        memory = None if cache is None else cache.layers[self.layer]
        device, context = hidden_states.device, mixer_context
        mixed = (self.mix if memory is None else partial(memory.run, self.mix))(
            hidden_states,
            rope=position_embeddings,
            first=None if context.first is None else FirstValues(*(_moved(part, device) for part in context.first)),
            state=None if memory is None else memory.state,
            keep_BT=_moved(context.keep, device),
            cu_seqlens=_moved(context.cu_seqlens, device),
            output_state=memory is not None,
            row_part=context.row_part,
        )
        if context.first is None:
            context.first = mixed.first
        if memory is not None:
            memory.remember(mixed.state, hidden_states.shape[1])
        return mixed.out, None

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
        """Mix a (normed) sequence.

        rope: cos and sin, [B or 1, T, K or less]. first: what the first recurrent layer gave; None in that layer.
        state: the state after the preceding tokens. keep_BT: False at padding, which then neither decays nor writes the
        state. cu_seqlens: int [N+1], document bounds in the flattened [B·T] (row bounds included); no state then.
        row_part: as in `MixerContext`, with the same bounds.
        """
        raise NotImplementedError


def to_heads(
    shape: AttentionShape,
    q_norm: nn.Module | None,
    k_norm: nn.Module | None,
    r_BTA: Tensor,
    k_BTA: Tensor,
    v_BTA: Tensor,
    rope: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of projections in heads, `(r [B,T,H,K], k [B,T,G,K], v [B,T,G,V])`: normed, rotated and scaled."""
    r, k, v = r_BTA, k_BTA, v_BTA
    if q_norm is not None and k_norm is not None and shape.norm_all_heads:
        r, k = q_norm(r), k_norm(k)
    r, k, v = (z.unflatten(-1, (-1, shape.head_dim)) for z in (r, k, v))
    if q_norm is not None and k_norm is not None and not shape.norm_all_heads:
        r, k = q_norm(r), k_norm(k)
    if rope is not None and shape.rotates:
        r, k = (shape.rotary or rotate_halves)(r, k, *rope, unsqueeze_dim=2)
    return (r if shape.q_scale == 1 else r * shape.q_scale), k, v


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """On a layer's device, where layers are spread over several."""
    return None if tensor is None else tensor.to(device)


class HeadNorm(nn.Module):
    """RMSNorm over the last axis in fp32, rounded like the Llama and Qwen families do."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def low_rank_size(width: int, exponent: float, scale: float) -> int:
    """max(1, round(width^exponent · scale / 32)) · 32, rounding half to even (2505.03005, appendix; table in tests)."""
    return max(1, round(width**exponent * scale / 32)) * 32


def repeat_kv(x_BTGK: Tensor, repeats: int) -> Tensor:
    """[B,T,G,K] -> [B,T,G·repeats,K]: kv head g serves the query heads g·repeats ... g·repeats + repeats - 1."""
    return x_BTGK if repeats == 1 else x_BTGK.repeat_interleave(repeats, dim=2)


def rotate_halves(
    r_BTHK: Tensor, k_BTGK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, unsqueeze_dim: int = 2
) -> tuple[Tensor, Tensor]:
    """Rotary positions of both, half-split; called as transformers' families call theirs."""
    return rotate_heads(r_BTHK, cos_BTP, sin_BTP), rotate_heads(k_BTGK, cos_BTP, sin_BTP)


def head_group_norm(x_BTHV: Tensor, weight_A: Tensor, bias_A: Tensor, eps: float) -> Tensor:
    """GroupNorm with one group a head, over each token alone, in fp32, in x's dtype."""
    wide = nn.functional.layer_norm(x_BTHV.float(), x_BTHV.shape[-1:], eps=eps).flatten(-2)
    return (wide * weight_A.float() + bias_A.float()).to(x_BTHV.dtype).view_as(x_BTHV)


def unit_keys(k_BTHK: Tensor) -> Tensor:
    """Keys of length one per head, computed in fp32."""
    return nn.functional.normalize(k_BTHK.float(), dim=-1).to(k_BTHK.dtype)


def low_rank(width_in: int, rank: int, width_out: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Offset [1,1,out], first factor [in,R], second factor [R,out], all uninitialised."""
    return (
        nn.Parameter(torch.empty(1, 1, width_out)),
        nn.Parameter(torch.empty(width_in, rank)),
        nn.Parameter(torch.empty(rank, width_out)),
    )


def init_low_rank_out(weight_RA: Tensor, scale: float = 0.1) -> None:
    """Orthogonal, gain scale·√(rows / columns if rows > columns else 1): the published start of second factors."""
    if weight_RA.is_meta:
        return
    rows, columns = weight_RA.shape
    gain = scale * (rows / columns) ** 0.5 if rows > columns else scale
    wide = torch.empty(rows, columns, dtype=torch.float32, device=weight_RA.device)
    nn.init.orthogonal_(wide, gain=gain)
    with torch.no_grad():
        weight_RA.copy_(wide)
