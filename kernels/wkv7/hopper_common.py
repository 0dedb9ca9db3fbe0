"""Common parts of the kernels for NVIDIA's Hopper: scales, copies between global and shared memory, constant triangles.

Written in Gluon, Triton's language of explicit layouts. Tiles in registers are transposed, [channels, tokens], so that
every product has 64 or 128 rows and runs on the wide matrix instructions; tiles in shared memory are [tokens, channels]
as in global memory. Names and formulas: README.md.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from radlads.kernels.shared.triton_tiles import locate_sequence as locate_in_triton

# Positions of sequences are computed as in the Triton kernels.
locate_sequence = gluon.jit(locate_in_triton.fn)


@gluon.jit
def power_of_two(top, TOP: gl.constexpr, LEAST: gl.constexpr):
    """The power of two s with s * top in [2^(TOP-1), 2^TOP), and 1/s; a top below 2^(LEAST-127) is raised to that."""
    exponent = gl.maximum((top.to(gl.int32, bitcast=True) >> 23) & 255, LEAST)
    up = ((253 + TOP - exponent) << 23).to(gl.float32, bitcast=True)
    down = ((exponent + 1 - TOP) << 23).to(gl.float32, bitcast=True)
    return up, down


@gluon.jit
def bits(scale):
    """log2 of a power of two."""
    return (((scale.to(gl.int32, bitcast=True) >> 23) & 255) - 127).to(gl.float32)


@gluon.jit
def inverse_of(scale):
    """1/scale of a power of two, without dividing."""
    return ((254 - ((scale.to(gl.int32, bitcast=True) >> 23) & 255)) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def largest(x):
    """The largest magnitude; computed on integers, which a warp reduces in one instruction."""
    return gl.max(gl.abs(x).to(gl.int32, bitcast=True), None).to(gl.float32, bitcast=True)


@gluon.jit
def _larger(a, b, c, d, e, f):
    return gl.maximum(a, d), gl.maximum(b, e), gl.maximum(c, f)


@gluon.jit
def largest_of_three(x, y, z):
    """Largest magnitudes of three tiles of one shape, reduced together: warps synchronise once."""
    return gl.reduce((gl.abs(x), gl.abs(y), gl.abs(z)), None, _larger)


@gluon.jit
def copy(target, pointer, offsets, mask, MASKED: gl.constexpr):
    """Global to shared memory, in the background; zeros where the mask is off."""
    if MASKED:
        async_copy.async_copy_global_to_shared(target, pointer + offsets, mask=mask)
    else:
        async_copy.async_copy_global_to_shared(target, pointer + offsets)


@gluon.jit
def row_offsets(start, left, head, H, D: gl.constexpr, BD: gl.constexpr, C: gl.constexpr, W: gl.constexpr):
    """Offsets [C,BD] of C tokens' channels of a head in [tokens,H,D], and which of them exist."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [W, 1], [1, 0])
    i = gl.arange(0, C, gl.SliceLayout(1, LAYOUT))[:, None]
    x = gl.arange(0, BD, gl.SliceLayout(0, LAYOUT))[None, :]
    return (start * (H * D) + head * D) + (i * (H * D) + x), (i < left) & (x < D)


@gluon.jit
def store_rows(
    pointer, source, start, left, head, H,
    D: gl.constexpr, BD: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """A tile [C,BD] from shared to global memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [W, 1], [1, 0])
    at, inside = row_offsets(start, left, head, H, D, BD, C, W)
    if TAIL or D != BD:
        gl.store(pointer + at, source.load(LAYOUT), mask=inside)
    else:
        gl.store(pointer + at, source.load(LAYOUT))


@gluon.jit
def state_offsets(K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, W: gl.constexpr):
    """Offsets [BK,BV] of a state [K,V], and which of them exist."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [W, 1], [1, 0])
    x = gl.arange(0, BK, gl.SliceLayout(1, LAYOUT))[:, None]
    y = gl.arange(0, BV, gl.SliceLayout(0, LAYOUT))[None, :]
    return x * V + y, (x < K) & (y < V)


@gluon.jit
def store_state(
    states, source, index, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, W: gl.constexpr
):
    """A state [BK,BV] from shared to global memory, the index-th there."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [W, 1], [1, 0])
    at, inside = state_offsets(K, V, BK, BV, W)
    if K != BK or V != BV:
        gl.store(states + index * (K * V) + at, source.load(LAYOUT), mask=inside)
    else:
        gl.store(states + index * (K * V) + at, source.load(LAYOUT))


@gluon.jit
def store_triangle(target, C: gl.constexpr, KIND: gl.constexpr, W: gl.constexpr):
    """[j,t] to shared memory: 1 where j <= t ("inclusive"), j < t ("strict") or j >= t ("reverse"), else 0.

    "centred inclusive" and "centred strict": less 1 where j < C/2, so that sums over j start in the middle.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [W, 1], [1, 0])
    j = gl.arange(0, C, gl.SliceLayout(1, LAYOUT))[:, None]
    t = gl.arange(0, C, gl.SliceLayout(0, LAYOUT))[None, :]
    before = gl.where(j < C // 2, 1.0, 0.0)
    if KIND == "inclusive":
        target.store((j <= t).to(target.dtype))
    elif KIND == "strict":
        target.store((j < t).to(target.dtype))
    elif KIND == "reverse":
        target.store((j >= t).to(target.dtype))
    elif KIND == "centred inclusive":
        target.store((gl.where(j <= t, 1.0, 0.0) - before).to(target.dtype))
    else:
        gl.static_assert(KIND == "centred strict")
        target.store((gl.where(j < t, 1.0, 0.0) - before).to(target.dtype))
