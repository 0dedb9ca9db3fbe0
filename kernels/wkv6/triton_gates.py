"""Decay inside a chunk for the Triton kernels: sums of the log decay whose exponentials never leave fp32, at any decay.

Pairs of a read i and a write j <= i in a chunk are sorted by distance. Level S holds those in one block of 2S tokens
with i in its upper and j in its lower half: with the border between the halves as reference, both factors of
e^(g_i - g_j) are at most one. The remaining blocks of 8 tokens on the diagonal are centred on their middle; their
exponents are at most 4 |log decay|. Every exponent is a sum over its own few tokens, never a difference of long sums.
"""

# ruff: noqa: RET505 -- of two compile-time branches only the taken one may exist
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(8)
# Decay stronger than e^-20 = 2e-9 is below the rounding of an fp32 state and is clamped to it: 4 * 20 < 88.
MIN_LOG_DECAY = tl.constexpr(-20.0)


@triton.jit
def load_decay(w, at, inside, MASKED: tl.constexpr):
    """Log decay [C,K] in its own dtype (bf16 sums are exact in the matrix units), clamped; zero outside the
    sequence."""
    if MASKED:
        x = tl.load(w + at, mask=inside, other=0.0)
    else:
        x = tl.load(w + at)
    return tl.maximum(x.to(tl.float32), MIN_LOG_DECAY).to(x.dtype)


@triton.jit
def sums(choice, w, AS_BF16: tl.constexpr, GATE: tl.constexpr):
    """choice [C,C] of 0 and ±1 times w [C,K], in fp32."""
    if AS_BF16:
        return tl.dot(choice.to(tl.bfloat16), w)
    else:
        return tl.dot(choice.to(tl.float32), w.to(tl.float32), input_precision=GATE)


@triton.jit
def from_start(w, C: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr):
    """Sum over tokens 0..i: the decay between the entering state and a read at i."""
    i = tl.arange(0, C)
    return sums(i[None, :] <= i[:, None], w, AS_BF16, GATE)


@triton.jit
def to_end(w, C: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr):
    """Sum over tokens i+1..C-1: the decay of a write at i until the end of the chunk."""
    i = tl.arange(0, C)
    return sums(i[None, :] > i[:, None], w, AS_BF16, GATE)


@triton.jit
def level_sums(w, S: tl.constexpr, C: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr):
    """To the border between the halves of i's block of 2S: forward from it in the upper half, up to it in the lower."""
    i = tl.arange(0, C)
    upper = ((i // S) % 2 == 1)[:, None]
    side = (upper & (i[None, :] <= i[:, None])) | ((upper == 0) & (i[None, :] > i[:, None]))
    return sums((i[:, None] // S == i[None, :] // S) & side, w, AS_BF16, GATE)


@triton.jit
def level_pairs(read, write, S: tl.constexpr):
    """Whether this pair of positions (of shapes that broadcast to [C,C]) belongs to level S."""
    return (read // (2 * S) == write // (2 * S)) & ((read // S) % 2 == 1) & ((write // S) % 2 == 0)


@triton.jit
def centred_sums(w, C: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr):
    """From the fourth token of i's diagonal block to i: negative after it, positive before it."""
    i = tl.arange(0, C)
    middle = (i // BLOCK * BLOCK + BLOCK // 2 - 1)[:, None]
    after = (i[None, :] > middle) & (i[None, :] <= i[:, None])
    before = (i[None, :] <= middle) & (i[None, :] > i[:, None])
    same = i[:, None] // BLOCK == i[None, :] // BLOCK
    choice = tl.where(after & same, 1.0, 0.0) - tl.where(before & same, 1.0, 0.0)
    return sums(choice, w, AS_BF16, GATE)


@triton.jit
def diagonal_pairs(read, write):
    """Whether this pair of positions is in one diagonal block with the write not after the read."""
    return (read // BLOCK == write // BLOCK) & (read >= write)
