"""Backward pass of wkv7 for NVIDIA's Hopper: one program walks back over the half-chunks of one head.

Dims: C half-chunk, K and V head dims, BK and BV the power of two, 64 or 128, that holds them. Reads Z = [a; r], writes
Y = [b; k], X = [U; v] and G = [dX; dO] are stacked in shared memory. hopper_common.py says how tiles lie; README.md has
the formulas and the scaling of the fp16 operands.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from radlads.kernels.wkv7.hopper_common import (
    LOG2E,
    bits,
    copy,
    inverse_of,
    largest,
    locate_sequence,
    power_of_two,
    row_offsets,
    state_offsets,
    store_rows,
    store_triangle,
)
from radlads.kernels.wkv7.triton_common import LENGTHS
from radlads.kernels.wkv7.triton_fused_forward import NUM_SCALES

SCALES = gl.constexpr(NUM_SCALES)
# Gradients may be tiny: only what is below 2^-67 counts as that large.
LEAST = gl.constexpr(60)


@gluon.jit
def copy_writes(
    w, k, v, b, U, tiles, start, left, head, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """What the writes of a half-chunk need."""
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
    """What the reads of a half-chunk need, T and Aqb T of it included."""
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


@gluon.jit
def make_writes(tiles, Y, fallS, g, upy, unx, BV: gl.constexpr, C: gl.constexpr, W: gl.constexpr):
    """Y, X and the decay [BK] of a half-chunk, in shared memory, from what was loaded and the decays g [BK,C]."""
    _, kS, vS, bS, X = tiles
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BV, BV // 8], [W, 1], [1, 0])
    xb, xk = bS.permute((1, 0)).load(L), kS.permute((1, 0)).load(L)
    token = gl.arange(0, C, gl.SliceLayout(0, L))[None, :]
    fallS.store(gl.exp2(LOG2E * gl.sum(gl.where(token == C - 1, g, 0.0), 1)))
    gate = gl.exp2(bits(upy) - g * LOG2E)
    Y.slice(0, C).permute((1, 0)).store((xb.to(gl.float32) * gate).to(gl.float16))
    Y.slice(C, C).permute((1, 0)).store((xk.to(gl.float32) * gate).to(gl.float16))
    X.slice(C, C).store((vS.load(ROWS).to(gl.float32) * inverse_of(unx)).to(gl.float16))


@gluon.jit
def decays(wS, strict, inclusive, C: gl.constexpr, BK: gl.constexpr, W: gl.constexpr):
    """What decays the state before each token, and before the next: log decays [BK,C], summed from the beginning."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])
    none = gl.zeros([BK, C], gl.float32, L)
    ge = warpgroup_mma(wS.permute((1, 0)), strict, none, use_acc=False, is_async=True)
    return ge, warpgroup_mma(wS.permute((1, 0)), inclusive, none, use_acc=False, is_async=True)


@gluon.jit
def half_back(
    gradients, dh, unit, reach, ge, g, wS, reads, X, Y, hS, fallS, made, outs, triangles,
    start, left, head, unh, unx, upz, upy, pair, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """Gradients of one half-chunk, and dh [BV,BK] before it: what it returns, times `unit`; reach: its largest."""
    dr, dw, dk, dv, da, db = gradients
    rS, aS, doS, solved, read = reads
    Z, G, lS, of_k, dAb, dAk = made
    drS, dwS, dkS, dvS, daS, dbS = outs
    inclusive, strict, reverse, earlier = triangles
    OUT: gl.constexpr = drS.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])
    LH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BK, 16])
    LP: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, W // 2], [16, 8])
    LD: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LEFT_H: gl.constexpr = gl.DotOperandLayout(0, LH, 2)
    unz, uny = inverse_of(upz), inverse_of(upy)
    none_k = gl.zeros([BK, C], gl.float32, L)
    none_v = gl.zeros([BV, C], gl.float32, L)
    Za, Zr, Ga, Gr = Z.slice(0, C), Z.slice(C, C), G.slice(0, C), G.slice(C, C)
    Yb, Yk = Y.slice(0, C).permute((1, 0)), Y.slice(C, C).permute((1, 0))
    Xb, Xk = X.slice(0, C).permute((1, 0)), X.slice(C, C).permute((1, 0))
    # Z, and what reaches the writes from after this half: S = Y l
    xa, xr = aS.permute((1, 0)).load(L), rS.permute((1, 0)).load(L)
    ea, er = gl.exp2(ge * LOG2E + bits(upz)), gl.exp2(g * LOG2E + bits(upz))
    Za.permute((1, 0)).store((xa.to(gl.float32) * ea).to(gl.float16))
    Zr.permute((1, 0)).store((xr.to(gl.float32) * er).to(gl.float16))
    do = doS.permute((1, 0)).load(L).to(gl.float32)
    fall = fallS.load(gl.SliceLayout(0, LH))[None, :]
    sl, unl = power_of_two(reach, 14, LEAST)
    ls = (dh * (fall * (sl * unit))).to(gl.float16)
    fence_async_shared()
    left_l = gl.convert_layout(ls, LEFT)
    Sb = warpgroup_mma(left_l, Yb, none_v, use_acc=False, is_async=True)
    Sk = warpgroup_mma(left_l, Yk, none_v, use_acc=False, is_async=True)
    lS.store(ls)
    i = gl.arange(0, 2 * C, gl.SliceLayout(1, LP))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, LP))[None, :]
    takes = (i % C > j) | ((i >= C) & (i % C == j))
    none_p = gl.zeros([2 * C, C], gl.float32, LP)
    A = mma_v2(Z.load(gl.DotOperandLayout(0, LP, 2)), Yk.load(gl.DotOperandLayout(1, LP, 2)), none_p)
    of_k.store(gl.where(takes, A, 0.0).to(gl.float16))
    Sb, Sk = warpgroup_mma_wait(0, deps=[Sb, Sk])
    of_S = uny * unl
    # Far below the largest fp16: what the triangles make of S and dO may be larger than both.
    sg, ung = power_of_two(largest(gl.maximum(gl.abs(Sb) * of_S, gl.abs(do))), -8, LEAST)
    Bb = gl.convert_layout((Sb * (sg * of_S)).to(gl.float16), LEFT)
    Bd = gl.convert_layout((do * (sg * pair)).to(gl.float16), LEFT)
    gr = (do * sg).to(gl.float16)
    ga = warpgroup_mma(Bb, solved, none_v, use_acc=False, is_async=True)
    ga = warpgroup_mma(Bd, read, ga, is_async=True)
    ga = warpgroup_mma_wait(0, deps=[ga]).to(gl.float16)
    new_unit = unz * ung
    dh = dh * (fall * (unit * inverse_of(new_unit)))
    dh = warpgroup_mma(gl.convert_layout(ga, LEFT_H), Za, dh, is_async=True)
    dh = warpgroup_mma(gl.convert_layout(gr, LEFT_H), Zr, dh, is_async=True)
    Ga.permute((1, 0)).store(ga)
    Gr.permute((1, 0)).store(gr)
    fence_async_shared()
    of_v = unz * uny * ung
    dvs = Sk * (of_S * inverse_of(of_v))
    dvs = warpgroup_mma(gl.convert_layout(ga, LEFT), of_k.slice(0, C), dvs, is_async=True)
    dvs = warpgroup_mma(gl.convert_layout(gr, LEFT), of_k.slice(C, C), dvs, is_async=True)
    # what b and k gave to the state after this half, to the reads of this half; what those took, from state and writes
    leave_b = warpgroup_mma(lS.permute((1, 0)), Xb, none_k, use_acc=False, is_async=True)
    leave_k = warpgroup_mma(lS.permute((1, 0)), Xk, none_k, use_acc=False, is_async=True)
    left_G = G.load(gl.DotOperandLayout(0, LP, 2))
    dA = mma_v2(left_G, Xb.load(gl.DotOperandLayout(1, LP, 2)), none_p)
    dAb.store(gl.where(takes, dA, 0.0).to(gl.float16))
    dA = mma_v2(left_G, Xk.load(gl.DotOperandLayout(1, LP, 2)), none_p)
    dAk.store(gl.where(takes, dA, 0.0).to(gl.float16))
    fence_async_shared()
    dh, dvs, leave_b, leave_k = warpgroup_mma_wait(0, deps=[dh, dvs, leave_b, leave_k])
    yb = warpgroup_mma(Z.permute((1, 0)), dAb, none_k, use_acc=False, is_async=True)
    yk = warpgroup_mma(Z.permute((1, 0)), dAk, none_k, use_acc=False, is_async=True)
    za = warpgroup_mma(hS, Ga.permute((1, 0)), none_k, use_acc=False, is_async=True)
    zr = warpgroup_mma(hS, Gr.permute((1, 0)), none_k, use_acc=False, is_async=True)
    near_a = warpgroup_mma(Yb, dAb.slice(0, C).permute((1, 0)), none_k, use_acc=False, is_async=True)
    near_r = warpgroup_mma(Yb, dAb.slice(C, C).permute((1, 0)), none_k, use_acc=False, is_async=True)
    near_a = warpgroup_mma(Yk, dAk.slice(0, C).permute((1, 0)), near_a, is_async=True)
    near_r = warpgroup_mma(Yk, dAk.slice(C, C).permute((1, 0)), near_r, is_async=True)
    reach = largest(dh) * new_unit
    # what passes through: the diagonal of h lT, of sixteen channels a warp
    left_h = hS.reshape([BK // 16, 16, BV]).load(gl.DotOperandLayout(0, LD, 2))
    right_l = lS.reshape([BV, BK // 16, 16]).permute((1, 0, 2)).load(gl.DotOperandLayout(1, LD, 2))
    block = mma_v2(left_h, right_l, gl.zeros([BK // 16, 16, 16], gl.float32, LD))
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, LD)))[None, :, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, LD)))[None, None, :]
    passed = gl.reshape(gl.sum(gl.where(row == column, block, 0.0), 2), [BK]) * (unh * unl)
    passed = gl.convert_layout(passed, gl.SliceLayout(1, L))[:, None]
    # A read and a write of one token pair without decay between them. Both sides of that pair are products of the very
    # same fp16 numbers, summed in fp32: they cancel when tokens are summed, below.
    of_pair = ung * unx * unz * uny
    of_leave = unx * unl * uny
    # The decays once more: kept in registers since above, they would push out what is needed in between.
    ge, g = decays(wS, strict, inclusive, C, BK, W)
    yb, yk, za, zr, near_a, near_r, ge, g = warpgroup_mma_wait(0, deps=[yb, yk, za, zr, near_a, near_r, ge, g])
    ratio = unh * inverse_of(unx * uny)
    za = za * ratio + near_a
    zr = zr * ratio + near_r
    y32 = Yb.load(L).to(gl.float32)
    pairs = y32 * yb
    leaving = y32 * leave_b
    yb = yb * of_pair + leave_b * of_leave
    y32 = Yk.load(L).to(gl.float32)
    pairs += y32 * yk
    leaving += y32 * leave_k
    yk = yk * of_pair + leave_k * of_leave
    of_a = Za.permute((1, 0)).load(L).to(gl.float32) * za
    of_r = Zr.permute((1, 0)).load(L).to(gl.float32) * zr
    differ = ((of_a + of_r) - pairs) * of_pair
    upper = (differ.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    lower = gl.convert_layout((differ - upper).to(gl.bfloat16), LEFT)
    leaving = gl.convert_layout((leaving * of_leave).to(gl.bfloat16), LEFT)
    grad = passed - of_a * of_pair
    grad = warpgroup_mma(gl.convert_layout(upper.to(gl.bfloat16), LEFT), reverse, grad, is_async=True)
    grad = warpgroup_mma(lower, reverse, grad, is_async=True)
    grad = warpgroup_mma(leaving, earlier, grad, is_async=True)
    dvS.permute((1, 0)).store((dvs * of_v).to(OUT))
    gate = gl.exp2(bits(upy) - g * LOG2E)
    dbS.permute((1, 0)).store((yb * gate).to(OUT))
    dkS.permute((1, 0)).store((yk * gate).to(OUT))
    up = bits(upz) + bits(of_pair)
    daS.permute((1, 0)).store((za * gl.exp2(ge * LOG2E + up)).to(OUT))
    drS.permute((1, 0)).store((zr * gl.exp2(g * LOG2E + up)).to(OUT))
    grad = warpgroup_mma_wait(0, deps=[grad])
    dwS.permute((1, 0)).store(grad.to(dwS.dtype))
    store_rows(dv, dvS, start, left, head, H, V, BV, C, TAIL, W)
    store_rows(db, dbS, start, left, head, H, K, BK, C, TAIL, W)
    store_rows(dk, dkS, start, left, head, H, K, BK, C, TAIL, W)
    store_rows(da, daS, start, left, head, H, K, BK, C, TAIL, W)
    store_rows(dr, drS, start, left, head, H, K, BK, C, TAIL, W)
    store_rows(dw, dwS, start, left, head, H, K, BK, C, TAIL, W)
    return dh, new_unit, reach


@gluon.jit(do_not_specialize=LENGTHS)
def hopper_backward_kernel(
    r, w, k, v, a, b, inverse, taken, dout, states, scales, U, dhT, dr, dw, dk, dv, da, db, dh0,
    cu_seqlens, offsets, T, num_chunks, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    PACKED: gl.constexpr, KEPT: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """All gradients of one head, with dh in registers. W warps: BK / 16 = BV / 16.

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
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BV, 16])
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
    n, head = program // H, program % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    xs = gl.arange(0, BK, gl.SliceLayout(0, LH))[None, :]
    ys = gl.arange(0, BV, gl.SliceLayout(1, LH))[:, None]
    at_state = (n * H + head) * (K * V) + (xs * V + ys)
    dh = gl.load(dhT + at_state, mask=(xs < K) & (ys < V), other=0.0)
    unit = 1.0
    reach = largest(dh)
    # Without hoisting: addresses of shared memory, kept from one round to the next, would fill the registers.
    for back in tl.range(-1, count, disable_licm=True):
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
        if back >= 0:
            async_copy.wait_group(1)
            kept = scaleS.index(parity)
            unh, unx, pair = load_scale(kept, 0, W), load_scale(kept, 1, W), load_scale(kept, 4, W)
            # Reads have only decayed since the beginning: there is room above them.
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
                fall = fall0.load(gl.SliceLayout(1, LS))[:, None]
                middle = h0.load(LS).to(gl.float32) * (unh * inverse_of(unx * uny))
                middle = warpgroup_mma(Y0.permute((1, 0)), X.index(now), middle)
                middleS.store((middle * (fall * (uny * unx * scale))).to(F16))
            else:
                Y1, h1 = Y0, hS.index(1)
                unh1 = load_scale(kept, 5, W)
                ge, g = decays(wS.index(1), strict, inclusive, C, BK, W)
                ge, g = warpgroup_mma_wait(0, deps=[ge, g])
                make_writes(writes1, Y1, fall1, g, upy, unx, BV, C, W)
            dh, unit, reach = half_back(
                gradients, dh, unit, reach, ge, g, wS.index(1), reads1, X.index(1), Y1, h1, fall1, made, outs,
                triangles, start + C, left - C, head, unh1, unx, upz, upy, pair, H, K, V, BK, BV, C, TAIL, W,
            )  # fmt: skip
        if step > 0:
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
                triangles, start, left, head, unh, unx, upz, upy, pair, H, K, V, BK, BV, C, TAIL, W,
            )  # fmt: skip
        if step > 0:
            copy_reads(
                r, a, dout, inverse, taken, reads0, chunk - H, 0, start - 2 * C, left + 2 * C, head, H,
                K, V, BK, BV, C, TAIL, W,
            )  # fmt: skip
            if not MIDDLE:
                copy_writes(w, k, v, b, U, writes0, start - 2 * C, left + 2 * C, head, H, K, V, BK, BV, C, TAIL, W)
                copy_state(h0, states, (chunk - H) * 2, K, V, BK, BV, W)
        async_copy.commit_group()
    async_copy.wait_group(0)
    gl.store(dh0 + at_state, dh * unit, mask=(xs < K) & (ys < V))
