"""Fused Triton kernel of the backward pass: one program walks back over the half-chunks of one head.

Dims: C half-chunk, K and V head dims, BK and BV the powers of two that hold them. Reads and writes are stacked, so that
one product of 2C rows does the work of four of C rows: Z = [a; r], Y = [b; k], X = [U; v], G = [dX; dO]. Notation and
the scaling of fp16 operands: README.md. Transposed products are computed with swapped operands.
"""

# ruff: noqa: SIM102 -- a compile-time condition must stay apart from a run-time one
from __future__ import annotations

import triton
import triton.language as tl

from radlads.kernels.shared.triton_tiles import LENGTHS, load_tile, locate, locate_sequence, store_tile
from radlads.kernels.wkv7.triton_fused_forward import SCALES, largest, power_of_two
from radlads.kernels.wkv7.triton_gates import LOG2E


@triton.jit
def load_pair(top_pointer, bottom_pointer, offsets, top, inside):
    """A stacked tile: rows where `top` from the first pointer, the others from the second; zeros outside."""
    upper = tl.load(top_pointer + offsets, mask=inside & top, other=0.0)
    lower = tl.load(bottom_pointer + offsets, mask=inside & ~top, other=0.0)
    return tl.where(top, upper, lower)


@triton.jit
def read_gates(wt, rho, j, C: tl.constexpr, WT: tl.constexpr, WP: tl.constexpr):
    """[2C,K], in log2: what has decayed the state of the beginning when a (which reads before it) or r reads."""
    own = (rho % C)[:, None]
    seen = (j[None, :] < own) | ((rho >= C)[:, None] & (j[None, :] == own))
    return tl.dot(seen.to(WT), wt.to(WT), input_precision=WP) * LOG2E


@triton.jit
def write_gates(wt, rho, j, C: tl.constexpr, WT: tl.constexpr, WP: tl.constexpr):
    """[2C,K], in log2: the inclusive cumulative decay, for b and k."""
    return tl.dot((j[None, :] <= (rho % C)[:, None]).to(WT), wt.to(WT), input_precision=WP) * LOG2E


@triton.jit
def half_state(
    b, k, v, w, U, states, chunk, half, start, left, head, rho, j, x, y, unh, unx, uny, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEPT: tl.constexpr, MASK_S: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr, WT: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """The state [K,V] before this half and 1/its scale: the chunk's, carried through the first half (at `start`)."""
    second = half == 1
    top = (rho < C)[:, None]
    in_k = second & (rho % C < left)[:, None] & (x < K)[None, :]
    in_v = second & (rho % C < left)[:, None] & (y < V)[None, :]
    at_k = (start + rho % C)[:, None] * (H * K) + head * K + x[None, :]
    at_v = (start + rho % C)[:, None] * (H * V) + head * V + y[None, :]
    at_w = (start + j)[:, None] * (H * K) + head * K + x[None, :]
    wt = tl.load(w + at_w, mask=second & (j < left)[:, None] & (x < K)[None, :], other=0.0)
    last = tl.sum(wt.to(tl.float32), 0) * LOG2E
    yx = load_pair(b, k, at_k, top, in_k)
    Y = (yx * (tl.exp2(last[None, :] - write_gates(wt, rho, j, C, WT, WP)) / uny)).to(DT)
    X = tl.load(U + at_v, mask=in_v & top, other=0.0)
    xv = tl.load(v + at_v, mask=in_v & ~top, other=0.0).to(tl.float32) / unx
    X = tl.where(top, X, xv.to(DT))
    at_h = chunk * (KEPT * K * V) + x[:, None] * V + y[None, :]
    h = load_tile(states, at_h, (x < K)[:, None] & (y < V)[None, :], MASK_S)
    scale, un = power_of_two(tl.maximum(unh * 16384.0, unx * uny * 1024.0), 14)
    new = tl.dot(tl.trans(Y), X, input_precision=IP) * (uny * unx * scale)
    return (h.to(tl.float32) * (tl.exp2(last)[:, None] * (unh * scale)) + new).to(DT), un


@triton.jit(do_not_specialize=LENGTHS)
def middles_kernel(
    w, k, v, b, states, scales, U, cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr, WT: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """The state in the middle of one chunk of one head, kept beside the one before it. C: half a chunk."""
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // H, program % H
    if PACKED:
        if slot >= tl.load(offsets + num_sequences).to(tl.int64):
            return
    first, length = locate(slot, cu_seqlens, offsets, num_sequences, T, num_chunks, 2 * C, PACKED)
    rho, j, x, y = tl.arange(0, 2 * C), tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    MASK_S: tl.constexpr = K != BK or V != BV
    unh = tl.load(scales + program * SCALES)
    unx = tl.load(scales + program * SCALES + 1)
    uny = tl.load(scales + program * SCALES + 3)
    hs, un = half_state(
        b, k, v, w, U, states, program, 1, first, length, head, rho, j, x, y, unh, unx, uny, H,
        K, V, C, 2, MASK_S, DT, IP, WT, WP,
    )  # fmt: skip
    at = (program * 2 + 1) * (K * V) + x[:, None] * V + y[None, :]
    store_tile(states, at, hs, (x < K)[:, None] & (y < V)[None, :], MASK_S)
    tl.store(scales + program * SCALES + 5, un)


@triton.jit(do_not_specialize=LENGTHS)
def fused_backward_kernel(
    r, w, k, v, a, b, inverse, taken, dout, states, scales, U, dhT, dr, dw, dk, dv, da, db, dh0,
    cu_seqlens, offsets, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, KEPT: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr, WT: tl.constexpr, WP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of one head, with dh in registers."""
    program = tl.program_id(0).to(tl.int64)
    n, head = program // H, program % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    rho, j, x, y = tl.arange(0, 2 * C), tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    MASK_S: tl.constexpr = K != BK or V != BV
    at_state = (n * H + head) * (K * V) + x[:, None] * V + y[None, :]
    in_state = (x < K)[:, None] & (y < V)[None, :]
    dh = load_tile(dhT, at_state, in_state, MASK_S).to(tl.float32)
    own = rho % C
    top = (rho < C)[:, None]
    same = own[None, :] == own[:, None]
    earlier = own[None, :] < own[:, None]
    later = own[None, :] > own[:, None]
    for back in tl.range(0, 2 * count, num_stages=STAGES):
        step = 2 * count - 1 - back
        chunk = (slot + step // 2) * H + head
        half = step % 2
        left = length - step * C
        start = first + step * C
        at_k = (start + own)[:, None] * (H * K) + head * K + x[None, :]
        at_v = (start + own)[:, None] * (H * V) + head * V + y[None, :]
        in_k = (own < left)[:, None] & (x < K)[None, :]
        in_v = (own < left)[:, None] & (y < V)[None, :]
        at_w = w + (start + j)[:, None] * (H * K) + head * K + x[None, :]
        in_w = (j < left)[:, None] & (x < K)[None, :]
        unh = tl.load(scales + chunk * SCALES)
        unx = tl.load(scales + chunk * SCALES + 1)
        unz = tl.load(scales + chunk * SCALES + 2)
        uny = tl.load(scales + chunk * SCALES + 3)
        pair = tl.load(scales + chunk * SCALES + 4)
        unz *= 0.015625  # reads have only decayed since the beginning: larger values still fit
        wt = tl.load(at_w, mask=in_w, other=0.0)
        last = tl.sum(wt.to(tl.float32), 0) * LOG2E
        zx = load_pair(a, r, at_k, top, in_k)
        yx = load_pair(b, k, at_k, top, in_k)
        Z = (zx * (tl.exp2(read_gates(wt, rho, j, C, WT, WP)) / unz)).to(DT)
        Y = (yx * (tl.exp2(-write_gates(wt, rho, j, C, WT, WP)) / uny)).to(DT)

        after = dh * tl.exp2(last)[:, None]
        sl, unl = power_of_two(largest(after), 14)
        ls = (after * sl).to(DT)
        S = tl.dot(Y, ls, input_precision=IP) * (uny * unl)
        do = tl.load(dout + at_v, mask=in_v & ~top, other=0.0)
        # Far below the largest fp16: what the triangles make of S and dO may be larger than both.
        sg, ung = power_of_two(largest(tl.maximum(tl.abs(S), tl.abs(do.to(tl.float32)))), -8)
        AT = tl.where(later | ((rho >= C)[None, :] & same), tl.dot(Y, tl.trans(Z), input_precision=IP), 0.0).to(DT)
        at_T = chunk * (4 * C * C) + (half * C + rho)[None, :] * (2 * C) + half * C + rho[:, None]
        at_R = chunk * (2 * C * C) + (half * C + own)[None, :] * C + rho[:, None]
        RT = tl.load(inverse + at_T, mask=top & (rho < C)[None, :], other=0.0)
        RT += tl.load(taken + at_R, mask=top & (rho >= C)[None, :], other=0.0)
        B = tl.where(top, S * sg, do * (sg * pair)).to(DT)
        G = tl.where(top, tl.dot(RT, B, input_precision=IP), do * sg).to(DT)
        S += tl.dot(AT, G, input_precision=IP) * (unz * uny * ung)
        tl.store(dv + at_v, S.to(dv.dtype.element_ty), mask=in_v & ~top)

        X = tl.load(U + at_v, mask=in_v & top, other=0.0)
        xv = tl.load(v + at_v, mask=in_v & ~top, other=0.0).to(tl.float32) / unx
        X = tl.where(top, X, xv.to(DT))
        # writes: contributions of b and k to later reads and to the state
        leave = tl.dot(X, tl.trans(ls), input_precision=IP) * (unx * unl)
        grad = tl.dot(earlier.to(tl.float32), Y.to(tl.float32) * (leave * uny), input_precision=IP)
        dA = tl.dot(X, tl.trans(G), input_precision=IP)
        dY = tl.dot(tl.where(later, dA, 0.0).to(DT), Z, input_precision=IP) * (ung * unx * unz)
        pairs = Y.to(tl.float32) * (dY * uny)
        dY += leave
        dY += tl.dot(tl.where((rho >= C)[None, :] & same, dA, 0.0).to(DT), Z, input_precision=IP) * (ung * unx * unz)
        # The decays are loaded again: held in registers from above, they would cause spills in between.
        dY *= tl.exp2(-write_gates(tl.load(at_w, mask=in_w, other=0.0), rho, j, C, WT, WP))
        tl.store(db + at_k, dY.to(db.dtype.element_ty), mask=in_k & top)
        tl.store(dk + at_k, dY.to(dk.dtype.element_ty), mask=in_k & ~top)
        # reads: values that a and r read from earlier writes and from the state
        if KEPT == 2:
            at_kv = (chunk * 2 + half) * (K * V) + x[:, None] * V + y[None, :]
            hs = load_tile(states, at_kv, in_state, MASK_S)
            unh = tl.load(scales + chunk * SCALES + half * 5)
        else:
            hs, unh = half_state(
                b, k, v, w, U, states, chunk, half, start - C, left + C, head, rho, j, x, y, unh, unx, uny, H,
                K, V, C, 1, MASK_S, DT, IP, WT, WP,
            )  # fmt: skip
        passed = tl.sum(hs.to(tl.float32) * ls.to(tl.float32), 1) * (unh * unl)
        dA = tl.dot(G, tl.trans(X), input_precision=IP)
        dZ = tl.dot(tl.where(earlier, dA, 0.0).to(DT), Y, input_precision=IP) * (ung * unx * uny)
        dZ += tl.dot(G, tl.trans(hs), input_precision=IP) * (ung * unh)
        read = Z.to(tl.float32) * (unz * dZ)
        grad += tl.dot((own[None, :] >= own[:, None]).to(tl.float32), read - pairs, input_precision=IP)
        tl.store(dw + at_k, (grad + passed[None, :] - read).to(dw.dtype.element_ty), mask=in_k & top)
        dZ += tl.dot(tl.where(~top & same, dA, 0.0).to(DT), Y, input_precision=IP) * (ung * unx * uny)
        dZ *= tl.exp2(read_gates(tl.load(at_w, mask=in_w, other=0.0), rho, j, C, WT, WP))
        tl.store(da + at_k, dZ.to(da.dtype.element_ty), mask=in_k & top)
        tl.store(dr + at_k, dZ.to(dr.dtype.element_ty), mask=in_k & ~top)

        new = tl.dot(tl.trans(Z), G, input_precision=IP) * (unz * ung)
        dh = dh * tl.exp2(last)[:, None] + new
    store_tile(dh0, at_state, dh, in_state, MASK_S)
