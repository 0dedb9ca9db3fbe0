"""Forward pass of wkv7 for NVIDIA's Hopper: one program walks over the chunks of one head, its state in registers.

Dims: C chunk, K and V head dims, BK and BV the power of two, 64 or 128, that holds them. hopper_common.py describes
the layout of tiles; README.md has the formulas and the scaling of the fp16 operands.
"""

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
    bits,
    copy,
    inverse_of,
    largest,
    largest_of_three,
    locate_sequence,
    power_of_two,
    row_offsets,
    store_rows,
    store_state,
    store_triangle,
)
from radlads.kernels.wkv7.triton_fused_forward import SCALES
from radlads.kernels.wkv7.triton_gates import LOG2E

# Largest magnitudes below 2^-31 are raised to that: products of three scales stay finite.
LEAST = gl.constexpr(96)


@gluon.jit
def copy_chunk(
    r, w, k, v, a, b, inverse, tiles, solved, chunk, start, left, head, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    rS, wS, kS, vS, aS, bS = tiles
    at_k, in_k = row_offsets(start, left, head, H, K, BK, C, W)
    at_v, in_v = row_offsets(start, left, head, H, V, BV, C, W)
    copy(wS, w, at_k, in_k, TAIL or K != BK)
    copy(aS, a, at_k, in_k, TAIL or K != BK)
    copy(bS, b, at_k, in_k, TAIL or K != BK)
    copy(rS, r, at_k, in_k, TAIL or K != BK)
    copy(kS, k, at_k, in_k, TAIL or K != BK)
    copy(vS, v, at_v, in_v, TAIL or V != BV)
    SQUARE: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [W, 1], [1, 0])
    i = gl.arange(0, C, gl.SliceLayout(1, SQUARE))[:, None]
    j = gl.arange(0, C, gl.SliceLayout(0, SQUARE))[None, :]
    copy(solved, inverse + chunk * (C * C), i * C + j, i < C, False)


@gluon.jit
def halves(x):
    """The left and the right half of the columns."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit(do_not_specialize=LENGTHS)
def hopper_forward_kernel(
    r, w, k, v, a, b, inverse, out, states, scales, U, h0, hT, cu_seqlens, offsets, T, num_chunks, H,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr, TAIL: gl.constexpr,
    PACKED: gl.constexpr, INITIAL: gl.constexpr, STORE: gl.constexpr, KEPT: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """One head: o. Keeps U, the state before every chunk, and all scales (if STORE). W warps: BK / 16 = BV / 16.

    KEPT: states per chunk; 2 if those of the middles are kept too.
    """
    IN: gl.constexpr = k.dtype.element_ty
    DECAY: gl.constexpr = w.dtype.element_ty
    F16: gl.constexpr = gl.float16
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], IN)
    VALUES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], IN)
    STATE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BV], F16)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], F16)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # In registers: [channels, tokens], [V, K] (the state), and products of all reads with writes.
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])
    LH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BK, 16])
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, W // 4], [16, 4 * C // W, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LEFT_H: gl.constexpr = gl.DotOperandLayout(0, LH, 2)

    rS, kS = gl.allocate_shared_memory(IN, [C, BK], KEYS), gl.allocate_shared_memory(IN, [C, BK], KEYS)
    aS, bS = gl.allocate_shared_memory(IN, [C, BK], KEYS), gl.allocate_shared_memory(IN, [C, BK], KEYS)
    wS, vS = gl.allocate_shared_memory(DECAY, [C, BK], KEYS), gl.allocate_shared_memory(IN, [C, BV], VALUES)
    loaded = (rS, wS, kS, vS, aS, bS)
    solved = gl.allocate_shared_memory(F16, [2, C, C], SQUARE)
    reads = gl.allocate_shared_memory(F16, [2 * C, BK], KEYS)  # r, then a
    kc, bc = gl.allocate_shared_memory(F16, [C, BK], KEYS), gl.allocate_shared_memory(F16, [C, BK], KEYS)
    of_k, of_b = gl.allocate_shared_memory(F16, [2 * C, C], SQUARE), gl.allocate_shared_memory(F16, [2 * C, C], SQUARE)
    enterS, leaveS = (
        gl.allocate_shared_memory(gl.float32, [BK], LINE),
        gl.allocate_shared_memory(gl.float32, [BK], LINE),
    )
    oS, uS = gl.allocate_shared_memory(IN, [C, BV], VALUES), gl.allocate_shared_memory(F16, [C, BV], VALUES)
    hS = gl.allocate_shared_memory(F16, [BK, BV], STATE)
    middleS = gl.allocate_shared_memory(F16, [BK if STORE and KEPT == 2 else 8, BV], STATE)
    inclusive = gl.allocate_shared_memory(DECAY, [C, C], SQUARE)
    strict = gl.allocate_shared_memory(DECAY, [C, C], SQUARE)
    store_triangle(inclusive, C, "centred inclusive", W)
    store_triangle(strict, C, "centred strict", W)
    fence_async_shared()

    program = gl.program_id(0).to(gl.int64)
    n, head = program // H, program % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    xs = gl.arange(0, BK, gl.SliceLayout(0, LH))[None, :]
    ys = gl.arange(0, BV, gl.SliceLayout(1, LH))[:, None]
    at_state = (n * H + head) * (K * V) + (xs * V + ys)
    if INITIAL:
        h = gl.load(h0 + at_state, mask=(xs < K) & (ys < V), other=0.0).to(gl.float32)
    else:
        h = gl.zeros([BV, BK], gl.float32, LH)
    reach = largest(h)
    none_k = gl.zeros([BK, C], gl.float32, L)
    none_v = gl.zeros([BV, C], gl.float32, L)
    none_p = gl.zeros([2 * C, C], gl.float32, LP)
    # Without hoisting: addresses of shared memory, kept from one round to the next, would fill the registers.
    for step in tl.range(-1, count, disable_licm=True):
        chunk = (slot + step) * H + head
        start = first + step * C
        left = length - step * C
        unread, unwrite, unv = 1.0, 1.0, 1.0
        vs = gl.zeros([BV, C], F16, L)
        if step >= 0:
            async_copy.wait_group(0)
            wt = wS.permute((1, 0))
            ge = warpgroup_mma(wt, strict, none_k, use_acc=False, is_async=True)
            g = warpgroup_mma(wt, inclusive, none_k, use_acc=False, is_async=True)
            xa, xr = aS.permute((1, 0)).load(L), rS.permute((1, 0)).load(L)
            xb, xk = bS.permute((1, 0)).load(L), kS.permute((1, 0)).load(L)
            xv = vS.permute((1, 0)).load(L)
            tops = largest_of_three(
                gl.maximum(gl.abs(xa), gl.abs(xr)).to(gl.float32), gl.maximum(gl.abs(xb), gl.abs(xk)).to(gl.float32),
                xv.to(gl.float32),
            )  # fmt: skip
            read, unread = power_of_two(tops[0], 0, LEAST)
            write, unwrite = power_of_two(tops[1], 0, LEAST)
            sv, unv = power_of_two(tops[2], 4, LEAST)
            ge, g = warpgroup_mma_wait(0, deps=[ge, g])
            token = gl.arange(0, C, gl.SliceLayout(0, L))[None, :]
            enterS.store(gl.exp2(-LOG2E * gl.sum(gl.where(token == 0, ge, 0.0), 1)))
            leaveS.store(gl.exp2(LOG2E * gl.sum(gl.where(token == C - 1, g, 0.0), 1)))
            fall = gl.exp2(bits(write) - g * LOG2E)
            qc = (xr.to(gl.float32) * gl.exp2(g * LOG2E + bits(read))).to(F16)
            ac = (xa.to(gl.float32) * gl.exp2(ge * LOG2E + bits(read))).to(F16)
            reads.slice(0, C).permute((1, 0)).store(qc)
            reads.slice(C, C).permute((1, 0)).store(ac)
            bc.permute((1, 0)).store((xb.to(gl.float32) * fall).to(F16))
            kc.permute((1, 0)).store((xk.to(gl.float32) * fall).to(F16))
            vs = (xv.to(gl.float32) * sv).to(F16)
            fence_async_shared()
            Ak = warpgroup_mma(reads, kc.permute((1, 0)), none_p, use_acc=False, is_async=True)
            Ab = warpgroup_mma(reads, bc.permute((1, 0)), none_p, use_acc=False, is_async=True)
            Ak, Ab = warpgroup_mma_wait(0, deps=[Ak, Ab])
            i = gl.arange(0, 2 * C, gl.SliceLayout(1, LP))[:, None]
            j = gl.arange(0, C, gl.SliceLayout(0, LP))[None, :]
            takes = (i % C > j) | ((i < C) & (i == j))
            of_k.store(gl.where(takes, Ak, 0.0).to(F16))
            of_b.store(gl.where(takes, Ab, 0.0).to(F16))
        if step + 1 < count:
            copy_chunk(
                r, w, k, v, a, b, inverse, loaded, solved.index((step + 1) & 1), chunk + H, start + C, left - C, head,
                H, K, V, BK, BV, C, TAIL, W,
            )  # fmt: skip
        async_copy.commit_group()
        if step >= 0:
            sh, unh = power_of_two(reach, 14, LEAST)
            enter = enterS.load(gl.SliceLayout(0, LH))[None, :]
            hA = gl.convert_layout((h * (enter * sh)).to(F16), LEFT)
            vA = gl.convert_layout(vs, LEFT)
            fence_async_shared()
            qcT, acT = reads.slice(0, C).permute((1, 0)), reads.slice(C, C).permute((1, 0))
            u = warpgroup_mma(hA, acT, none_v, use_acc=False, is_async=True)
            more = warpgroup_mma(vA, of_k.slice(C, C).permute((1, 0)), none_v, use_acc=False, is_async=True)
            o = warpgroup_mma(hA, qcT, none_v, use_acc=False, is_async=True)
            if STORE:
                hS.permute((1, 0)).store((h * sh).to(F16))
            u, more, o = warpgroup_mma_wait(0, deps=[u, more, o])
            u = u * (unread * unh) + more * (unread * unwrite * unv)
            # v (below 16 unv) and U have one scale. Solving may make U larger than u: larger values still fit.
            su, unu = power_of_two(gl.maximum(largest(u), 16.0 * unv), -1, LEAST)
            unit = unu * unwrite
            us = gl.convert_layout((u * su).to(F16), LEFT)
            us = warpgroup_mma(us, solved.index(step & 1).permute((1, 0)), none_v, use_acc=False, is_async=True)
            h = h * (enter * inverse_of(unit))
            o = o * (unh * inverse_of(unit))
            us = warpgroup_mma_wait(0, deps=[us]).to(F16)
            vs = vs * (unv * su).to(F16)
            if STORE and KEPT == 2:
                # After the first half of the chunk, whose end is what decays are counted from, h is its state.
                v0, v1 = halves(vs)
                u0, u1 = halves(us)
                h = warpgroup_mma(gl.convert_layout(v0, LEFT_H), kc.slice(0, C // 2), h, is_async=True)
                h = warpgroup_mma(gl.convert_layout(u0, LEFT_H), bc.slice(0, C // 2), h, is_async=True)
                h = warpgroup_mma_wait(0, deps=[h])
                sm, unm = power_of_two(gl.maximum(unh * 16384.0, unit * 1024.0), 14, LEAST)
                middleS.permute((1, 0)).store((h * (unit * sm)).to(F16))
                gl.store(scales + chunk * SCALES + 5, unm)
                h = warpgroup_mma(gl.convert_layout(v1, LEFT_H), kc.slice(C // 2, C // 2), h, is_async=True)
                h = warpgroup_mma(gl.convert_layout(u1, LEFT_H), bc.slice(C // 2, C // 2), h, is_async=True)
            else:
                h = warpgroup_mma(gl.convert_layout(vs, LEFT_H), kc, h, is_async=True)
                h = warpgroup_mma(gl.convert_layout(us, LEFT_H), bc, h, is_async=True)
            o = warpgroup_mma(gl.convert_layout(vs, LEFT), of_k.slice(0, C).permute((1, 0)), o, is_async=True)
            o = warpgroup_mma(gl.convert_layout(us, LEFT), of_b.slice(0, C).permute((1, 0)), o, is_async=True)
            if STORE:
                uS.permute((1, 0)).store(us)
                gl.store(scales + chunk * SCALES, unh)
                gl.store(scales + chunk * SCALES + 1, unu)
                gl.store(scales + chunk * SCALES + 2, unread)
                gl.store(scales + chunk * SCALES + 3, unwrite)
            leave = leaveS.load(gl.SliceLayout(0, LH))[None, :]
            h, o = warpgroup_mma_wait(0, deps=[h, o])
            oS.permute((1, 0)).store((o * (unread * unit)).to(IN))
            h = h * (leave * unit)
            reach = largest(h)
            store_rows(out, oS, start, left, head, H, V, BV, C, TAIL, W)
            if STORE:
                store_rows(U, uS, start, left, head, H, V, BV, C, TAIL, W)
                store_state(states, hS, chunk * KEPT, K, V, BK, BV, W)
                if KEPT == 2:
                    store_state(states, middleS, chunk * KEPT + 1, K, V, BK, BV, W)
    async_copy.wait_group(0)
    gl.store(hT + at_state, h, mask=(xs < K) & (ys < V))
