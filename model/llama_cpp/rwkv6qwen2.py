"""llama.cpp's graph `rwkv6qwen2`, and which forms of rad_rwkv6 it computes.

Dims: D model width, H heads, G heads of keys and values, K width of a head, D = H·K, R low rank. x [D] is the normed
input of a layer, x' that of the token before (0 before the first). Read from llama.cpp's src/models/rwkv6qwen2.cpp and
rwkv6-base.cpp, where there is no `time_mix_first`:

    m = w2 tanh(w1 (x + (x' - x) ⊙ lerp_x))                    [5,D]      branches in the order w, k, v, r, g
    x_w = x + (x' - x) ⊙ (lerp_w + m_w),  likewise x_k, x_v, x_r, x_g     time_mix_lerp_fused [5,1,1,D]
    r, k, v = receptance x_r, key x_k, value x_v               with biases, where the file has them; k, v repeated
    decay = exp(-exp(time_mix_decay + decay_w2 tanh(decay_w1 x_w)))
    k = k ⊙ (1 - decay)
    S_t = diag(decay) S_{t-1} + k vᵀ,  y = K^(-1/2) S_tᵀ r
    out = output (y ⊙ σ(gate x_g))

Against rad_rwkv6: no floor of the decay, so the file is written only where no channel can reach it: |tanh| is below 1,
so time_decay plus the sum of the absolute values of a channel's column of the second factor is the most that its
log-log decay can be. Without token shift w1 is zero; without gate the gate is σ(0) = 1/2, and output is doubled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from radlads.model.llama_cpp.pieces import Piece, Source
from radlads.model.mixers.rad_rwkv6 import Mixer

NAME = "rwkv6qwen2"
_ORDER = (3, 1, 2, 0, 4)
"""The graph's branches w, k, v, r, g among rad_rwkv6's r, k, v, w, g."""
_NO_SHIFT_RANK = 32


def why_not(mixer: Mixer) -> str | None:
    """The first thing that the graph lacks, of what this mixer has; None if it has all but for `floor_reached`."""
    lacks = (
        (bool(mixer.options.rope), "rotary positions in mixers (the option rope)"),
        (mixer.shape.qk_norm, "norms on queries and keys, which the teacher's attention has"),
        (mixer.options.form != "balanced", "the GroupNorm of the option form"),
        (mixer.options.gate == "low_rank", "a gate of low rank (the option gate)"),
    )
    return next((name for missing, name in lacks if missing), None)


def floor_reached(source: Source, mixer: Mixer, prefix: str) -> int:
    """How many channels of a layer may decay beyond the floor, which the graph does not have."""
    base, factor = source.files.read(f"{prefix}time_decay"), source.files.read(f"{prefix}time_decay_w2")
    most = base.float().flatten() + factor.float().abs().sum(0)
    return int((most > math.log(-mixer.CONSTANTS["least_log_decay"])).sum())


def add_settings(writer: Any, mixers: dict[int, Mixer]) -> None:
    """The graph's own sizes. writer: a GGUFWriter."""
    options = mixers[0].options
    writer.add_time_mix_extra_dim(options.shift_rank if options.token_shift else _NO_SHIFT_RANK)
    writer.add_time_decay_extra_dim(options.decay_rank)
    writer.add_head_count_kv(mixers[0].shape.num_kv_heads)


def mixer_pieces(source: Source, mixer: Mixer, layer: int, prefix: str) -> Iterator[Piece]:
    """The tensors of a layer's mixer; prefix: of its tensors' names in the student."""
    D, options, shape = mixer.shape.hidden_size, mixer.options, mixer.shape

    def named(part: str, kind: str = "weight") -> str:
        return f"blk.{layer}.time_mix_{part}.{kind}"

    parts = (("receptance", "q_proj", shape.q_bias), ("key", "k_proj", shape.k_bias), ("value", "v_proj", shape.v_bias))
    for part, projection, bias in parts:
        yield source.matrix(named(part), f"{prefix}{projection}.weight")
        if bias:
            yield source.vector(named(part, "bias"), f"{prefix}{projection}.bias")
    if options.gate == "none":
        yield source.zeros(named("gate"), D, D, wide=False)
        yield source.made(named("output"), (D, D), lambda o: o * 2, f"{prefix}o_proj.weight", wide=False)
    else:
        yield source.matrix(named("gate"), f"{prefix}gate.weight")
        yield source.matrix(named("output"), f"{prefix}o_proj.weight")
    yield source.vector(named("decay"), f"{prefix}time_decay")
    yield source.turned(named("decay_w1"), f"{prefix}time_decay_w1")
    yield source.turned(named("decay_w2"), f"{prefix}time_decay_w2")
    if not options.token_shift:
        yield source.zeros(named("w1"), len(_ORDER) * _NO_SHIFT_RANK, D)
        yield source.zeros(named("w2"), len(_ORDER), D, _NO_SHIFT_RANK)
        yield source.zeros(named("lerp_x"), D)
        yield source.zeros(named("lerp_fused"), len(_ORDER), 1, 1, D)
        return
    yield from _shift(source, named, prefix, options.shift_rank, D)


def _shift(source: Source, named: Any, prefix: str, rank: int, D: int) -> Iterator[Piece]:
    order = list(_ORDER)

    def w1(w1_DR: Tensor) -> Tensor:  # [D, 5·R] → [5·R, D]
        return w1_DR.T.unflatten(0, (len(order), rank))[order]

    def w2(w2_5RD: Tensor) -> Tensor:  # [5, R, D] → [5, D, R]
        return w2_5RD.transpose(1, 2)[order]

    yield source.made(named("w1"), (len(order) * rank, D), w1, f"{prefix}time_maa_w1")
    yield source.made(named("w2"), (len(order), D, rank), w2, f"{prefix}time_maa_w2")
    yield source.vector(named("lerp_x"), f"{prefix}time_maa_x")
    names = [f"{prefix}time_maa_{one}" for one in "wkvrg"]
    yield source.made(named("lerp_fused"), (len(order), 1, 1, D), lambda *shifts: torch.stack(shifts), *names)
