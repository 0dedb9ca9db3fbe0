"""One half-chunk of the backward pass of wkv7 on Hopper: its writes, and all gradients.

Dims: C half-chunk, K and V head dims, BK and BV the power of two, 64 or 128, that holds them. Reads Z = [a; r], writes
Y = [b; k], X = [U; v] and G = [dX; dO] are stacked in shared memory. hopper_common.py describes the layout of tiles;
README.md has the formulas and the scaling of the fp16 operands.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from radlads.kernels.wkv7.hopper_common import bits, inverse_of, largest, power_of_two, store_rows
from radlads.kernels.wkv7.triton_gates import LOG2E

# Gradients may be tiny: largest magnitudes below 2^-67 are raised to that.
LEAST = gl.constexpr(60)


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
def make_middle(target, h0, Y, X, fallS, unh, before, after, BV: gl.constexpr, W: gl.constexpr):
    """The state after a half, to shared memory: that before it (scale unh), decayed, and what the half writes.

    before: 1/scale of Y times that of X; after: this, times the scale of what is kept.
    """
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BV, 16])
    fall = fallS.load(gl.SliceLayout(1, LS))[:, None]
    middle = h0.load(LS).to(gl.float32) * (unh * inverse_of(before))
    middle = warpgroup_mma(Y.permute((1, 0)), X, middle)
    target.store((middle * (fall * after)).to(gl.float16))


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
    active, start, left, head, unh, unx, upz, upy, pair, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    SPLIT: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Gradients of one half-chunk (with SPLIT, if `active`), and dh [BV,BK] before it: what it returns, times `unit`.

    reach: the largest magnitude of dh.
    """
    rS, aS, doS, solved, read = reads
    Z, _, lS, of_k, _, _ = made
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])
    LH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BK, 16])
    LP: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, W // 2], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LEFT_H: gl.constexpr = gl.DotOperandLayout(0, LH, 2)
    unz, uny = inverse_of(upz), inverse_of(upy)
    none_v = gl.zeros([BV, C], gl.float32, L)
    Za, Zr = Z.slice(0, C), Z.slice(C, C)
    Yb, Yk = Y.slice(0, C).permute((1, 0)), Y.slice(C, C).permute((1, 0))
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
    if not SPLIT:
        lS.store(ls)
        store_products(of_k, Z.load(gl.DotOperandLayout(0, LP, 2)), Yk, C, W)
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
    scales = (unh, unx, unz, uny, upz, upy, unl, ung)
    if SPLIT:
        dh = warpgroup_mma_wait(0, deps=[dh])
        reach = largest(dh) * new_unit
        if active:
            lS.store(ls)
            store_products(of_k, Z.load(gl.DotOperandLayout(0, LP, 2)), Yk, C, W)
            gradients_of_half(
                gradients, dh, ga, gr, Sk, wS, X, Y, hS, made, outs, triangles, scales, start, left, head, H,
                K, V, BK, BV, C, TAIL, W,
            )  # fmt: skip
    else:
        dh, reach = gradients_of_half(
            gradients, dh, ga, gr, Sk, wS, X, Y, hS, made, outs, triangles, scales, start, left, head, H,
            K, V, BK, BV, C, TAIL, W,
        )  # fmt: skip
        reach *= new_unit
    return dh, new_unit, reach


@gluon.jit
def store_products(target, left, right, C: gl.constexpr, W: gl.constexpr):
    """To shared memory, in fp16: the products [2C,C] of reads (or G) with writes (or X) that come no later."""
    LP: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, W // 2], [16, 8])
    i = gl.arange(0, 2 * C, gl.SliceLayout(1, LP))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, LP))[None, :]
    takes = (i % C > j) | ((i >= C) & (i % C == j))
    found = mma_v2(left, right.load(gl.DotOperandLayout(1, LP, 2)), gl.zeros([2 * C, C], gl.float32, LP))
    target.store(gl.where(takes, found, 0.0).to(gl.float16))


@gluon.jit
def gradients_of_half(
    gradients, dh, ga, gr, Sk, wS, X, Y, hS, made, outs, triangles, scales, start, left, head, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """All six gradients of one half-chunk, from its G = [ga; gr] and S; waits for dh, too, and finds its largest."""
    dr, dw, dk, dv, da, db = gradients
    Z, G, lS, of_k, dAb, dAk = made
    drS, dwS, dkS, dvS, daS, dbS = outs
    inclusive, strict, reverse, earlier = triangles
    unh, unx, unz, uny, upz, upy, unl, ung = scales
    OUT: gl.constexpr = drS.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])
    LP: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, W // 2], [16, 8])
    LD: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    none_k = gl.zeros([BK, C], gl.float32, L)
    Za, Zr, Ga, Gr = Z.slice(0, C), Z.slice(C, C), G.slice(0, C), G.slice(C, C)
    Yb, Yk = Y.slice(0, C).permute((1, 0)), Y.slice(C, C).permute((1, 0))
    Xb, Xk = X.slice(0, C).permute((1, 0)), X.slice(C, C).permute((1, 0))
    Ga.permute((1, 0)).store(ga)
    Gr.permute((1, 0)).store(gr)
    fence_async_shared()
    of_v = unz * uny * ung
    dvs = Sk * (uny * unl * inverse_of(of_v))
    dvs = warpgroup_mma(gl.convert_layout(ga, LEFT), of_k.slice(0, C), dvs, is_async=True)
    dvs = warpgroup_mma(gl.convert_layout(gr, LEFT), of_k.slice(C, C), dvs, is_async=True)
    # what b and k gave to the state after this half, to the reads of this half; what those took, from state and writes
    leave_b = warpgroup_mma(lS.permute((1, 0)), Xb, none_k, use_acc=False, is_async=True)
    leave_k = warpgroup_mma(lS.permute((1, 0)), Xk, none_k, use_acc=False, is_async=True)
    left_G = G.load(gl.DotOperandLayout(0, LP, 2))
    store_products(dAb, left_G, Xb, C, W)
    store_products(dAk, left_G, Xk, C, W)
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
    reach = largest(dh)
    # what passes through: the diagonal of h lT, of sixteen channels a warp
    left_h = hS.reshape([BK // 16, 16, BV]).load(gl.DotOperandLayout(0, LD, 2))
    right_l = lS.reshape([BV, BK // 16, 16]).permute((1, 0, 2)).load(gl.DotOperandLayout(1, LD, 2))
    block = mma_v2(left_h, right_l, gl.zeros([BK // 16, 16, 16], gl.float32, LD))
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, LD)))[None, :, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, LD)))[None, None, :]
    passed = gl.reshape(gl.sum(gl.where(row == column, block, 0.0), 2), [BK]) * (unh * unl)
    passed = gl.convert_layout(passed, gl.SliceLayout(1, L))[:, None]
    # A read and a write of one token pair without decay between them. Both sides of that pair are products of the
    # same fp16 numbers, summed in fp32: they cancel when tokens are summed, below.
    of_pair = ung * unx * unz * uny
    of_leave = unx * unl * uny
    # The decays are loaded again: held in registers from above, they would cause spills in between.
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
    return dh, reach
