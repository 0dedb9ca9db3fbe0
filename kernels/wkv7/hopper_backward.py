"""Backward pass of wkv7 for NVIDIA's Hopper: one program walks back over the half-chunks of one head.

Dims: C half-chunk, K and V head dims, BK and BV the power of two, 64 or 128, that holds them. This file loads
tiles and carries dh; hopper_half.py computes a half-chunk.
"""

# ruff: noqa: SIM114 -- a compile-time condition must stay apart from a run-time one
from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from radlads.kernels.shared.triton_tiles import LENGTHS
from radlads.kernels.wkv7.hopper_common import (
    copy,
    inverse_of,
    largest,
    locate_sequence,
    power_of_two,
    row_offsets,
    state_offsets,
    store_triangle,
)
from radlads.kernels.wkv7.hopper_half import LEAST, decays, half_back, make_middle, make_writes
from radlads.kernels.wkv7.triton_fused_forward import SCALES

# Start of the later of two pieces, in hundredths of a sequence: a step for dh alone is assumed to take half the time.
LATER_BEGIN = gl.constexpr(35)


@gluon.jit
def copy_writes(
    w, k, v, b, U, tiles, start, left, head, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """Inputs of the writes of a half-chunk."""
    wS, kS, vS, bS, X = tiles
    at_k, in_k = row_offsets(start, left, head, H, K, BK, C, W)
    at_v, in_v = row_offsets(start, left, head, H, V, BV, C, W)
    copy(wS, w, at_k, in_k, TAIL or K != BK)
    copy(kS, k, at_k, in_k, TAIL or K != BK)
    copy(bS, b, at_k, in_k, TAIL or K != BK)
    copy(vS, v, at_v, in_v, TAIL or V != BV)
    copy(X.slice(0, C), U, at_v, in_v, TAIL or V != BV)


@gluon.jit
def copy_reads(
    r, a, dout, inverse, taken, tiles, chunk, half, start, left, head, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """Inputs of the reads of a half-chunk, with its T and Aqb T."""
    rS, aS, doS, solved, read = tiles
    at_k, in_k = row_offsets(start, left, head, H, K, BK, C, W)
    at_v, in_v = row_offsets(start, left, head, H, V, BV, C, W)
    copy(aS, a, at_k, in_k, TAIL or K != BK)
    copy(rS, r, at_k, in_k, TAIL or K != BK)
    copy(doS, dout, at_v, in_v, TAIL or V != BV)
    SQUARE: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [W, 1], [1, 0])
    i = gl.arange(0, C, gl.SliceLayout(1, SQUARE))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, SQUARE))[None, :]
    copy(solved, inverse + chunk * (4 * C * C) + half * (C * 2 * C + C), i * (2 * C) + j, i < C, False)
    copy(read, taken + chunk * (2 * C * C) + half * (C * C), i * C + j, i < C, False)


@gluon.jit
def copy_state(
    target, states, index, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, W: gl.constexpr
):
    at, inside = state_offsets(K, V, BK, BV, W)
    copy(target, states + index * (K * V), at, inside, K != BK or V != BV)


@gluon.jit
def copy_scales(target, scales, chunk, W: gl.constexpr):
    i = gl.arange(0, 8, gl.BlockedLayout([1], [32], [W], [0]))
    copy(target, scales + chunk * SCALES, i, i < SCALES, True)


@gluon.jit
def load_scale(source, which: gl.constexpr, W: gl.constexpr):
    return gl.max(source.slice(which, 1).load(gl.BlockedLayout([1], [32], [W], [0])), 0)


@gluon.jit(do_not_specialize=LENGTHS)
def hopper_backward_kernel(
    r, w, k, v, a, b, inverse, taken, dout, states, scales, U, dhT, dr, dw, dk, dv, da, db, dh0,
    cu_seqlens, offsets, T, num_chunks, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    PACKED: gl.constexpr, KEPT: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """All gradients of one head, with dh in registers. W warps: BK / 16 = BV / 16.

    SPLIT: two programs a head. One walks over the later chunks; the other, over these too, but for dh alone, and then
    over the earlier ones: neither waits for the other.

    KEPT: states per chunk. If 1, the state of a chunk's middle is made here, and with it the first half's writes come
    before the second half is walked back; if 2, each half has its own.
    """
    IN: gl.constexpr = k.dtype.element_ty
    DECAY: gl.constexpr = w.dtype.element_ty
    F16: gl.constexpr = gl.float16
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], IN)
    VALUES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], IN)
    STATE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BV], F16)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], F16)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BK, 16])
    MIDDLE: gl.constexpr = KEPT == 1
    # What is loaded, of both halves. What is in use until the end of a round has room for that of the next round, too.
    AHEAD: gl.constexpr = 3 if MIDDLE else 2
    wS = gl.allocate_shared_memory(DECAY, [AHEAD, C, BK], KEYS)
    kS = gl.allocate_shared_memory(IN, [2, C, BK], KEYS)
    bS = gl.allocate_shared_memory(IN, [2, C, BK], KEYS)
    vS = gl.allocate_shared_memory(IN, [2, C, BV], VALUES)
    X = gl.allocate_shared_memory(F16, [AHEAD, 2 * C, BV], VALUES)
    rS = gl.allocate_shared_memory(IN, [2, C, BK], KEYS)
    aS = gl.allocate_shared_memory(IN, [2, C, BK], KEYS)
    doS = gl.allocate_shared_memory(IN, [2, C, BV], VALUES)
    solved = gl.allocate_shared_memory(F16, [2, C, C], SQUARE)
    read = gl.allocate_shared_memory(F16, [2, C, C], SQUARE)
    hS = gl.allocate_shared_memory(F16, [2, BK, BV], STATE)
    scaleS = gl.allocate_shared_memory(gl.float32, [2, 8], LINE)
    # What is made here.
    Y = gl.allocate_shared_memory(F16, [2 if MIDDLE else 1, 2 * C, BK], KEYS)
    middleS = gl.allocate_shared_memory(F16, [BK if MIDDLE else 8, BV], STATE)
    fall1, fall0 = gl.allocate_shared_memory(gl.float32, [BK], LINE), gl.allocate_shared_memory(gl.float32, [BK], LINE)
    made = (
        gl.allocate_shared_memory(F16, [2 * C, BK], KEYS), gl.allocate_shared_memory(F16, [2 * C, BV], VALUES),
        gl.allocate_shared_memory(F16, [BV, BK], STATE), gl.allocate_shared_memory(F16, [2 * C, C], SQUARE),
        gl.allocate_shared_memory(F16, [2 * C, C], SQUARE), gl.allocate_shared_memory(F16, [2 * C, C], SQUARE),
    )  # fmt: skip
    outs = (
        gl.allocate_shared_memory(IN, [C, BK], KEYS), gl.allocate_shared_memory(DECAY, [C, BK], KEYS),
        gl.allocate_shared_memory(IN, [C, BK], KEYS), gl.allocate_shared_memory(IN, [C, BV], VALUES),
        gl.allocate_shared_memory(IN, [C, BK], KEYS), gl.allocate_shared_memory(IN, [C, BK], KEYS),
    )  # fmt: skip
    inclusive = gl.allocate_shared_memory(DECAY, [C, C], SQUARE)
    strict = gl.allocate_shared_memory(DECAY, [C, C], SQUARE)
    reverse = gl.allocate_shared_memory(gl.bfloat16, [C, C], SQUARE)
    earlier = gl.allocate_shared_memory(gl.bfloat16, [C, C], SQUARE)
    store_triangle(inclusive, C, "inclusive", W)
    store_triangle(strict, C, "strict", W)
    store_triangle(reverse, C, "reverse", W)
    store_triangle(earlier, C, "strict", W)
    triangles = (inclusive, strict, reverse, earlier)
    gradients = (dr, dw, dk, dv, da, db)
    reads1 = (rS.index(1), aS.index(1), doS.index(1), solved.index(1), read.index(1))
    reads0 = (rS.index(0), aS.index(0), doS.index(0), solved.index(0), read.index(0))
    writes1 = (wS.index(1), kS.index(1), vS.index(1), bS.index(1), X.index(1))
    fence_async_shared()

    program = gl.program_id(0).to(gl.int64)
    early = program % 2 == 0
    if SPLIT:
        program = program // 2
    n, head = program // H, program % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    xs = gl.arange(0, BK, gl.SliceLayout(0, LH))[None, :]
    ys = gl.arange(0, BV, gl.SliceLayout(1, LH))[:, None]
    at_state = (n * H + head) * (K * V) + (xs * V + ys)
    dh = gl.load(dhT + at_state, mask=(xs < K) & (ys < V), other=0.0)
    unit = 1.0
    reach = largest(dh)
    lowest, boundary = 0, count
    if SPLIT:
        boundary = count * LATER_BEGIN // 100
        lowest = gl.where(early, 0, boundary)
        boundary = gl.where(early, boundary, count)
    # Without hoisting: addresses of shared memory, kept from one round to the next, would fill the registers.
    for back in tl.range(-1, count - lowest, disable_licm=True):
        step = count - 1 - back
        chunk = (slot + step) * H + head
        start = first + step * (2 * C)
        left = length - step * (2 * C)
        parity = step & 1
        now, then = 0, 0
        if MIDDLE:
            now, then = 2 * parity, 2 - 2 * parity
        writes0 = (wS.index(now), kS.index(0), vS.index(0), bS.index(0), X.index(now))
        next0 = (wS.index(then), kS.index(0), vS.index(0), bS.index(0), X.index(then))
        h0 = hS.index(0)
        if MIDDLE:
            h0 = hS.index(parity)
        Y0 = Y.index(0)
        upz, upy, unh, unx, pair = 1.0, 1.0, 1.0, 1.0, 1.0
        active = step < boundary
        if back >= 0:
            async_copy.wait_group(1)
            kept = scaleS.index(parity)
            unh, unx, pair = load_scale(kept, 0, W), load_scale(kept, 1, W), load_scale(kept, 4, W)
            # Reads have only decayed since the beginning: larger values still fit.
            upz = inverse_of(load_scale(kept, 2, W)) * 64.0
            uny = load_scale(kept, 3, W)
            upy = inverse_of(uny)
            if MIDDLE:
                Y1, h1 = Y.index(1), middleS
                none = gl.zeros([BK, C], gl.float32, gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16]))
                w0 = wS.index(now).permute((1, 0))
                first_g = warpgroup_mma(w0, inclusive, none, use_acc=False, is_async=True)
                ge, g = decays(wS.index(1), strict, inclusive, C, BK, W)
                first_g, ge, g = warpgroup_mma_wait(0, deps=[first_g, ge, g])
                make_writes(writes0, Y0, fall0, first_g, upy, unx, BV, C, W)
                make_writes(writes1, Y1, fall1, g, upy, unx, BV, C, W)
                fence_async_shared()
                scale, unh1 = power_of_two(gl.maximum(unh * 16384.0, unx * uny * 1024.0), 14, LEAST)
                before, after = unx * uny, unx * uny * scale
                if not SPLIT:
                    make_middle(middleS, h0, Y0, X.index(now), fall0, unh, before, after, BV, W)
                elif active:
                    make_middle(middleS, h0, Y0, X.index(now), fall0, unh, before, after, BV, W)
            else:
                Y1, h1 = Y0, hS.index(1)
                unh1 = load_scale(kept, 5, W)
                ge, g = decays(wS.index(1), strict, inclusive, C, BK, W)
                ge, g = warpgroup_mma_wait(0, deps=[ge, g])
                make_writes(writes1, Y1, fall1, g, upy, unx, BV, C, W)
            dh, unit, reach = half_back(
                gradients, dh, unit, reach, ge, g, wS.index(1), reads1, X.index(1), Y1, h1, fall1, made, outs,
                triangles, active, start + C, left - C, head, unh1, unx, upz, upy, pair, H,
                K, V, BK, BV, C, TAIL, SPLIT, W,
            )  # fmt: skip
        if step > lowest:
            copy_writes(w, k, v, b, U, writes1, start - C, left + C, head, H, K, V, BK, BV, C, TAIL, W)
            copy_reads(
                r, a, dout, inverse, taken, reads1, chunk - H, 1, start - C, left + C, head, H, K, V, BK, BV, C, TAIL, W
            )  # fmt: skip
            if MIDDLE:
                copy_writes(w, k, v, b, U, next0, start - 2 * C, left + 2 * C, head, H, K, V, BK, BV, C, TAIL, W)
                copy_state(hS.index(1 - parity), states, chunk - H, K, V, BK, BV, W)
            else:
                copy_state(hS.index(1), states, (chunk - H) * 2 + 1, K, V, BK, BV, W)
            copy_scales(scaleS.index(1 - parity), scales, chunk - H, W)
        async_copy.commit_group()
        if back >= 0:
            async_copy.wait_group(1)
            ge, g = decays(wS.index(now), strict, inclusive, C, BK, W)
            ge, g = warpgroup_mma_wait(0, deps=[ge, g])
            if not MIDDLE:
                make_writes(writes0, Y0, fall0, g, upy, unx, BV, C, W)
            dh, unit, reach = half_back(
                gradients, dh, unit, reach, ge, g, wS.index(now), reads0, X.index(now), Y0, h0, fall0, made, outs,
                triangles, active, start, left, head, unh, unx, upz, upy, pair, H, K, V, BK, BV, C, TAIL, SPLIT, W,
            )  # fmt: skip
        if step > lowest:
            copy_reads(
                r, a, dout, inverse, taken, reads0, chunk - H, 0, start - 2 * C, left + 2 * C, head, H,
                K, V, BK, BV, C, TAIL, W,
            )  # fmt: skip
            if not MIDDLE:
                copy_writes(w, k, v, b, U, writes0, start - 2 * C, left + 2 * C, head, H, K, V, BK, BV, C, TAIL, W)
                copy_state(h0, states, (chunk - H) * 2, K, V, BK, BV, W)
        async_copy.commit_group()
    async_copy.wait_group(0)
    if early or not SPLIT:
        gl.store(dh0 + at_state, dh * unit, mask=(xs < K) & (ys < V))
