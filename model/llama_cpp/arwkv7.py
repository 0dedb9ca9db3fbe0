"""llama.cpp's graph `arwkv7`, and which mixers of the RWKV-7 family it computes.

Dims: D model width, H heads, K width of a head, D = H·K, R low rank. x [D] is the normed input of a layer, x' that of
the token before (0 before the first). Read from llama.cpp's src/models/arwkv7.cpp and rwkv7-base.cpp:

    x_r = x + (x' - x) ⊙ lerp_r,  likewise x_w, x_k, x_v, x_a, x_g        time_mix_lerp_fused [6 or 5,1,1,D]
    r, k, v = receptance x_r, key x_k, value x_v               [D]        no biases, no norms, no rotation, G = H
    decay = exp(-0.606531 σ(w0 + w2 tanh(w1 x_w))),  a = σ(a0 + a2 a1 x_a)
    v = v + (v_first - v) ⊙ σ(v0 + v2 v1 x_v)                             not in layer 0, whose v is v_first
    kk = k ⊙ k_k / ‖k ⊙ k_k‖,  k = k ⊙ (1 + (a - 1) ⊙ k_a)                ‖·‖ per head, at least 1e-12
    S_t = S_{t-1} diag(decay) - (S_{t-1} kk)(kk ⊙ a)ᵀ + v kᵀ,  y = S_t r
    y = GroupNorm_H(y), eps 64e-5                                         where the file has time_mix_ln
    y = y + (Σ_K r ⊙ k ⊙ r_k) v
    y = y ⊙ g2 σ(g1 x_g)                                                  where the file has g1 and g2
    out = output y

What a mixer lacks is switched off by zeros: no token shift, lerp 0; no bonus, r_k 0. A gate of 1 + g2 σ(g1 x) has a
further rank with g1 = 0 and g2 = 2, which adds 2 σ(0) = 1. Heads of keys and values are repeated for grouped heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from radlads.model.llama_cpp.pieces import Piece, Source
from radlads.model.mixers.shared.rwkv7_design import Design, Rwkv7Mixer

NAME = "arwkv7"
_GROUP_NORM_EPS = 64e-5
_DECAY_OFFSET = 0.5
_GATE_PADDING = 32
"""Ranks that are added for the constant of a gate: one is needed, and a multiple of 32 suits all kernels."""


def why_not(mixer: Rwkv7Mixer) -> str | None:
    """The first thing that the graph lacks, of what this mixer has; None if it has all."""
    design, shape = mixer.design, mixer.shape
    scaling = {"decay": "its decay", "log_log_decay": "its log-log decay"}
    lacks = (
        (bool(getattr(mixer.options, "rope", False)), "rotary positions in mixers (the option rope)"),
        (shape.qk_norm, "norms on queries and keys, which the teacher's attention has"),
        (shape.q_bias or shape.k_bias or shape.v_bias, "biases of queries, keys and values, which the teacher has"),
        (design.key_scaling != "k_a", f"keys scaled by {scaling.get(design.key_scaling)} (key_scaling)"),
        (design.decay_offset != _DECAY_OFFSET, f"a decay offset of {design.decay_offset} (it has {_DECAY_OFFSET})"),
        (design.first_keys, "keys of the first layer in deeper ones"),
        (design.value_lora_scale is not None, "low-rank values without a first layer"),
        (design.first_values != "heads", "layers without the first one's values, or with those before the repeat"),
        (design.output_scale, "an output scale of K^(-1/2)"),
        (
            design.group_norm_eps not in (None, _GROUP_NORM_EPS),
            f"a GroupNorm with an eps of {design.group_norm_eps} (it has {_GROUP_NORM_EPS})",
        ),
    )
    return next((name for missing, name in lacks if missing), None)


def add_settings(writer: Any, mixers: dict[int, Rwkv7Mixer]) -> None:
    """The graph's own sizes. writer: a GGUFWriter."""
    options, design = mixers[0].options, mixers[0].design
    writer.add_decay_lora_rank(options.decay_rank)
    writer.add_iclr_lora_rank(options.iclr_rank)
    writer.add_value_residual_mix_lora_rank(options.value_rank)
    writer.add_gate_lora_rank(_gate_rank(design, options))


def mixer_pieces(source: Source, mixer: Rwkv7Mixer, layer: int, prefix: str) -> Iterator[Piece]:
    """The tensors of a layer's mixer; prefix: of its tensors' names in the student."""
    design, D = mixer.design, mixer.shape.hidden_size
    repeats = mixer.shape.num_heads // mixer.shape.num_kv_heads

    def named(part: str) -> str:
        return f"blk.{layer}.time_mix_{part}.weight"

    yield source.matrix(named("receptance"), f"{prefix}q_proj.weight")
    for part, projection in (("key", "k_proj"), ("value", "v_proj")):
        yield source.repeated(named(part), f"{prefix}{projection}.weight", mixer.shape.head_dim, repeats)
    yield source.matrix(named("output"), f"{prefix}o_proj.weight")
    for part in "wav":
        # The first layer's values are v_first; the graph wants the tensors all the same, with the ranks of a.
        origin = "a" if part == "v" and mixer.v0 is None else part
        yield source.vector(named(f"{part}0"), f"{prefix}{origin}0")
        yield source.turned(named(f"{part}1"), f"{prefix}{origin}1")
        yield source.turned(named(f"{part}2"), f"{prefix}{origin}2")
    for part in ("k_k", "k_a"):
        yield source.vector(named(part), f"{prefix}{part}")
    yield source.vector(named("r_k"), f"{prefix}r_k") if design.bonus else source.zeros(named("r_k"), D)
    yield _lerp(source, named("lerp_fused"), prefix, design, D)
    yield from _gate(source, named, prefix, design, mixer.options)
    if mixer.ln_x is not None:
        yield source.vector(named("ln"), f"{prefix}ln_x.weight")
        yield source.vector(f"blk.{layer}.time_mix_ln.bias", f"{prefix}ln_x.bias")


def _lerp(source: Source, name: str, prefix: str, design: Design, D: int) -> Piece:
    branches = "rwkva" if design.gate == "none" else "rwkvag"
    shape = (len(branches), 1, 1, D)
    if not design.token_shift:
        return source.zeros(name, *shape)
    return source.made(name, shape, lambda *shifts: torch.stack(shifts), *(f"{prefix}x_{one}" for one in branches))


def _gate_rank(design: Design, options: Any) -> int:
    if design.gate == "none":
        return 0
    return int(options.gate_rank) + (_GATE_PADDING if design.gate == "one_plus" else 0)


def _gate(source: Source, named: Any, prefix: str, design: Design, options: Any) -> Iterator[Piece]:
    if design.gate == "none":
        return
    if design.gate == "product":
        yield source.turned(named("g1"), f"{prefix}g1", wide=False)
        yield source.turned(named("g2"), f"{prefix}g2", wide=False)
        return
    rank = _gate_rank(design, options)
    (D, _), (_, A) = source.files.shape(f"{prefix}g1"), source.files.shape(f"{prefix}g2")

    def more_g1(g1_DR: Tensor) -> Tensor:
        return torch.cat((g1_DR, g1_DR.new_zeros(D, _GATE_PADDING)), 1).T

    def more_g2(g2_RA: Tensor) -> Tensor:
        constant = g2_RA.new_zeros(_GATE_PADDING, A)
        constant[0] = 2.0
        return torch.cat((g2_RA, constant)).T

    yield source.made(named("g1"), (rank, D), more_g1, f"{prefix}g1", wide=False)
    yield source.made(named("g2"), (A, rank), more_g2, f"{prefix}g2", wide=False)
