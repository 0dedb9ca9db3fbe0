"""What mixers share: sizes, low-rank maps, GQA repeat, RoPE, per-head norms, the first-layer residual, the state.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key dim per head, V value dim per head (= K),
A = H·K, R low rank, N packed sequences. Needs torch only: an exported model carries this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from radlads.kernels.wkv7 import wkv7, wkv7_step


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention that a mixer replaces, read from the module and never from a config's defaults."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_bias: bool
    k_bias: bool
    v_bias: bool
    o_bias: bool
    qk_norm: bool
    norm_eps: float

    @property
    def width(self) -> int:
        """A = H·K; differs from D in some teachers."""
        return self.num_heads * self.head_dim


def read_attention_shape(attention: nn.Module, family: Any, norm_eps: float) -> AttentionShape:
    """Sizes of a softmax attention module; `family` names its projections."""
    q, k, v, o = (getattr(attention, name) for name in (family.q, family.k, family.v, family.o))
    head_dim = int(attention.head_dim)
    return AttentionShape(
        hidden_size=q.in_features,
        num_heads=q.out_features // head_dim,
        num_kv_heads=k.out_features // head_dim,
        head_dim=head_dim,
        q_bias=q.bias is not None,
        k_bias=k.bias is not None,
        v_bias=v.bias is not None,
        o_bias=o.bias is not None,
        qk_norm=family.q_norm is not None,
        norm_eps=norm_eps,
    )


class FirstValues(NamedTuple):
    """What the first recurrent layer hands to the deeper ones: values, so that the gradient reaches it."""

    v: Tensor | None = None
    """[B,T,H,V]"""
    k: Tensor | None = None
    """[B,T,H,K]"""


class MixerState(NamedTuple):
    """Recurrent memory of one layer between calls."""

    wkv: Tensor
    """[B,H,K,V], fp32."""
    shift: Tensor | None = None
    """[B,D], the last input, for variants with a token shift."""


class MixerOutput(NamedTuple):
    """What a mixer gives: its output [B,T,D], the values for deeper layers, its memory where asked for."""

    out: Tensor
    first: FirstValues
    state: MixerState | None


class Mixer(nn.Module):
    """Base of the recurrent replacements of attention: the projections under the teacher's names, and its q/k norms."""

    CONSTANTS: ClassVar[dict[str, float]] = {}
    """Numbers that define the variant; written into the exported config and compared on load."""

    def __init__(self, shape: AttentionShape, layer: int, num_layers: int) -> None:
        super().__init__()
        self.shape = shape
        self.layer = layer
        self.depth = layer / max(1, num_layers - 1)
        D, A, kv = shape.hidden_size, shape.width, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(D, A, bias=shape.q_bias)
        self.k_proj = nn.Linear(D, kv, bias=shape.k_bias)
        self.v_proj = nn.Linear(D, kv, bias=shape.v_bias)
        self.o_proj = nn.Linear(A, D, bias=shape.o_bias)
        self.q_norm = HeadNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = HeadNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else None

    def project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """`(r [B,T,H,K], k [B,T,G,K], v [B,T,G,V])`: projected, normed where the teacher norms, rotated by `rope`."""
        B, T, _ = x_BTD.shape
        r, k, v = (p(x_BTD).view(B, T, -1, self.shape.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            r, k = self.q_norm(r), self.k_norm(k)
        if rope is not None:
            r, k = apply_rope(r, *rope), apply_rope(k, *rope)
        return r, k, v

    def repeat(self, x_BTGK: Tensor) -> Tensor:
        return repeat_kv(x_BTGK, self.shape.num_heads // self.shape.num_kv_heads)

    def heads(self, x_BTA: Tensor) -> Tensor:
        """[B,T,A] -> [B,T,H,K]."""
        return x_BTA.unflatten(-1, (self.shape.num_heads, self.shape.head_dim))

    def forward(
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
        """Mix a (normed) sequence.

        rope: cos and sin, [B or 1, T, K or less]. first: what the first recurrent layer gave; None in that layer.
        state: where the sequence left off. keep_BT: False at padding, which then neither decays nor writes the state.
        cu_seqlens: int [N+1], document bounds in the flattened [B·T] (row bounds included); no state then.
        """
        raise NotImplementedError


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


def apply_rope(x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """Rotate the first P of K channels, half-split convention; the rest pass."""
    P = cos_BTP.shape[-1]
    turned, passed = x_BTHK[..., :P], x_BTHK[..., P:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos_BTP.unsqueeze(2) + torch.cat((-high, low), dim=-1) * sin_BTP.unsqueeze(2)
    return turned if passed.shape[-1] == 0 else torch.cat((turned, passed), dim=-1)


def head_group_norm(x_BTHV: Tensor, weight_A: Tensor, bias_A: Tensor, eps: float) -> Tensor:
    """GroupNorm with one group a head, over each token alone, in fp32, in x's dtype."""
    wide = nn.functional.layer_norm(x_BTHV.float(), x_BTHV.shape[-1:], eps=eps).flatten(-2)
    return (wide * weight_A.float() + bias_A.float()).to(x_BTHV.dtype).view_as(x_BTHV)


def unit_keys(k_BTHK: Tensor) -> Tensor:
    """Keys of length one per head, computed in fp32."""
    return nn.functional.normalize(k_BTHK.float(), dim=-1).to(k_BTHK.dtype)


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


def run_wkv7(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    kk_BTHK: Tensor,
    iclr_BTHK: Tensor,
    *,
    state: MixerState | None,
    keep_BT: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """The RWKV-7 recurrence with its removal key: `(out [B,T,H,V], state [B,H,K,V] fp32 or None)`.

    One token on a kept state is a decode step (the state is updated in place); everything else is one parallel pass.
    """
    if keep_BT is not None:
        keep = keep_BT[..., None, None].to(k_BTHK.dtype)
        log_decay_BTHK, k_BTHK, kk_BTHK = log_decay_BTHK * keep, k_BTHK * keep, kk_BTHK * keep
    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, -kk_BTHK, kk_BTHK * iclr_BTHK)
    B, T = r_BTHK.shape[:2]
    if cu_seqlens is not None:
        if state is not None or output_state:
            raise ValueError("packed documents (cu_seqlens) and a recurrent state exclude each other")
        out, _ = wkv7(*(x.reshape(1, B * T, *x.shape[2:]) for x in inputs), cu_seqlens=cu_seqlens)
        return out.view_as(v_BTHV), None
    if T == 1 and state is not None and not training:
        wkv = state.wkv
        return wkv7_step(*(x[:, 0] for x in inputs), wkv).unsqueeze(1), wkv
    return wkv7(*inputs, initial_state=None if state is None else state.wkv, output_final_state=output_state)
