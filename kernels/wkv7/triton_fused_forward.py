"""Fused Triton kernels of the forward pass: the inverses of all chunks, then one program walks over each head.

Dims: C chunk, K and V head dims, BK and BV the powers of two that hold them. Notation and the scaling of the fp16
operands: README.md. Transposed products are computed with swapped operands, never from a transposed result.
"""

# ruff: noqa: SIM102, RET505 -- a compile-time condition must stay apart from a run-time one, and its branches too
from __future__ import annotations

import triton
import triton.language as tl

from radlads.kernels.shared.triton_tiles import LENGTHS, load_tile, locate, locate_sequence, store_tile
from radlads.kernels.wkv7.triton_gates import centred_gates, gates, unit_lower_inverse

# Per chunk, 1/scale of: the state before it; v and U; reads (r, a); writes (k, b); the product r bᵀ; the state in its
# middle.
NUM_SCALES = 6
SCALES = tl.constexpr(NUM_SCALES)


@triton.jit
def power_of_two(top, TOP: tl.constexpr):
    """The power of two s with s * top in [2^(TOP-1), 2^TOP), and 1/s."""
    exponent = tl.maximum((top.to(tl.int32, bitcast=True) >> 23) & 255, 60)
    up = ((253 + TOP - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent + 1 - TOP) << 23).to(tl.float32, bitcast=True)
    return up, down


@triton.jit
def largest(x):
    """The largest magnitude; computed on integers, which a warp reduces in one instruction."""
    SIZE: tl.constexpr = x.numel
    flat = tl.reshape(tl.abs(x).to(tl.float32), [SIZE], can_reorder=True)
    return tl.max(flat.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, b, c, d, e, f):
    return tl.maximum(a, d), tl.maximum(b, e), tl.maximum(c, f)


@triton.jit
def largest_of_three(x, y, z, SAME: tl.constexpr):
    """Largest magnitudes of three tiles; for tiles of one size in one reduction."""
    if SAME:
        SIZE: tl.constexpr = x.numel
        xs = tl.reshape(tl.abs(x).to(tl.float32), [SIZE], can_reorder=True)
        ys = tl.reshape(tl.abs(y).to(tl.float32), [SIZE], can_reorder=True)
        zs = tl.reshape(tl.abs(z).to(tl.float32), [SIZE], can_reorder=True)
        return tl.reduce((xs, ys, zs), 0, _larger)
    else:
        return largest(x), largest(y), largest(z)


@triton.jit(do_not_specialize=LENGTHS)
def solve_kernel(
    r, w, a, b, inverse, reads, scales, widest, cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr,
    STORE: tl.constexpr, CUMULATE_BY_DOT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """T = (I - Aab)^-1 [C,C] of a chunk of a head, and Aqb T of its halves (if STORE); notes decays out of range."""
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // H, program % H
    if PACKED:
        if slot >= tl.load(offsets + num_sequences).to(tl.int64):
            return
    first, length = locate(slot, cu_seqlens, offsets, num_sequences, T, num_chunks, C, PACKED)
    i, j, x = tl.arange(0, C), tl.arange(0, 16), tl.arange(0, BK)
    MASK: tl.constexpr = TAIL or K != BK
    at = (first + i)[:, None] * (H * K) + head * K + x[None, :]
    inside = (i < length)[:, None] & (x < K)[None, :]
    g, ge = centred_gates(load_tile(w, at, inside, MASK), C, CUMULATE_BY_DOT)
    reach = largest(tl.maximum(tl.abs(g), tl.abs(ge)))
    if (reach > LIMIT) | (reach != reach):
        # A NaN is no decay out of range, and shows in the output. The sums of an infinite one are NaN too.
        endless = largest(load_tile(w, at, inside, MASK)) == float("inf")
        tl.atomic_max(widest, tl.where(reach == reach, reach, tl.where(endless, float("inf"), 0.0)))
    xa, xb = load_tile(a, at, inside, MASK), load_tile(b, at, inside, MASK)
    sa, una = power_of_two(largest(xa), 0)
    sb, unb = power_of_two(largest(xb), 0)
    ac = (xa * (tl.exp2(ge) * sa)).to(DT)
    bc = (xb * (tl.exp2(-g) * sb)).to(DT)
    blocks = tl.dot(
        tl.reshape(ac, [C // 16, 16, BK]),
        tl.permute(tl.reshape(bc, [C // 16, 16, BK]), (0, 2, 1)),
        input_precision=IP,
    )
    blocks = tl.where((j[:, None] > j[None, :])[None, :, :], blocks * (una * unb), 0.0)
    A = tl.where(i[:, None] > i[None, :], tl.dot(ac, tl.trans(bc), input_precision=IP) * (una * unb), 0.0)
    inv = unit_lower_inverse(blocks, A, C, LEVELS, DT, IP)
    store_tile(inverse, program * (C * C) + i[:, None] * C + i[None, :], inv, True, False)
    if STORE:
        xr = load_tile(r, at, inside, MASK)
        sr, unr = power_of_two(largest(xr), 0)
        qc = (xr * (tl.exp2(g) * sr)).to(DT)
        half = i // (C // 2)
        same = half[:, None] == half[None, :]
        Aqb = tl.where(same & (i[:, None] >= i[None, :]), tl.dot(qc, tl.trans(bc), input_precision=IP), 0.0)
        product = tl.dot(Aqb.to(DT), tl.where(same, inv, 0.0).to(DT), input_precision=IP)
        at_half = program * (C * C // 2) + i[:, None] * (C // 2) + (i % (C // 2))[None, :]
        store_tile(reads, at_half, product, same, True)
        tl.store(scales + program * SCALES + 4, unr * unb)


@triton.jit(do_not_specialize=LENGTHS)
def fused_forward_kernel(
    r, w, k, v, a, b, inverse, out, states, scales, U, h0, hT, cu_seqlens, offsets, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr, STORE: tl.constexpr, KEPT: tl.constexpr,
    CUMULATE_BY_DOT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head: o. Keeps U, the state before every chunk, and all scales (if STORE).

    KEPT: room for states per chunk; 2 if those of the middles will be kept too.
    """
    program = tl.program_id(0).to(tl.int64)
    n, head = program // H, program % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    i, x, y = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    MASK_K: tl.constexpr = TAIL or K != BK
    MASK_V: tl.constexpr = TAIL or V != BV
    MASK_S: tl.constexpr = K != BK or V != BV
    at_state = (n * H + head) * (K * V) + x[:, None] * V + y[None, :]
    in_state = (x < K)[:, None] & (y < V)[None, :]
    if INITIAL:
        h = load_tile(h0, at_state, in_state, MASK_S).to(tl.float32)
    else:
        h = tl.zeros([BK, BV], tl.float32)
    strict = i[:, None] > i[None, :]
    lower = i[:, None] >= i[None, :]
    for step in tl.range(0, count, num_stages=STAGES):
        chunk = (slot + step) * H + head
        token = first + step * C + i
        rows = step * C + i < length
        at_k = token[:, None] * (H * K) + head * K + x[None, :]
        at_v = token[:, None] * (H * V) + head * V + y[None, :]
        in_k = rows[:, None] & (x < K)[None, :]
        in_v = rows[:, None] & (y < V)[None, :]
        g, ge, m, last = gates(load_tile(w, at_k, in_k, MASK_K), C, C // 2, CUMULATE_BY_DOT)
        xa, xb = load_tile(a, at_k, in_k, MASK_K), load_tile(b, at_k, in_k, MASK_K)
        xr, xk = load_tile(r, at_k, in_k, MASK_K), load_tile(k, at_k, in_k, MASK_K)
        xv = load_tile(v, at_v, in_v, MASK_V)
        inv = tl.load(inverse + chunk * (C * C) + i[:, None] * C + i[None, :])
        tops = largest_of_three(tl.maximum(tl.abs(xr), tl.abs(xa)), tl.maximum(tl.abs(xk), tl.abs(xb)), xv, BK == BV)
        read, unread = power_of_two(tops[0], 0)
        write, unwrite = power_of_two(tops[1], 0)
        sv, unsv = power_of_two(tops[2], 4)
        fall = tl.exp2(m[None, :] - g) * write
        ac = (xa * (tl.exp2(ge - m[None, :]) * read)).to(DT)
        bc = (xb * fall).to(DT)
        kc = (xk * fall).to(DT)
        qc = (xr * (tl.exp2(g - m[None, :]) * read)).to(DT)
        vs = (xv * sv).to(DT)
        pair = unread * unwrite
        sh, unsh = power_of_two(largest(h), 14)
        hs = (h * (tl.exp2(m)[:, None] * sh)).to(DT)
        Aak = tl.where(strict, tl.dot(ac, tl.trans(kc), input_precision=IP), 0.0).to(DT)
        u = tl.dot(Aak, vs, input_precision=IP) * (pair * unsv) + tl.dot(ac, hs, input_precision=IP) * (unread * unsh)
        # The backward pass uses one scale for v and U, from the larger of the two.
        su, unsu = power_of_two(tl.maximum(largest(u), tops[2]), -1)
        us = tl.dot(inv, (u * su).to(DT), input_precision=IP).to(DT)
        if STORE:
            store_tile(U, at_v, us, in_v, MASK_V)
            store_tile(states, chunk * (KEPT * K * V) + x[:, None] * V + y[None, :], h * sh, in_state, MASK_S)
            tl.store(scales + chunk * SCALES, unsh)
            tl.store(scales + chunk * SCALES + 1, unsu)
            tl.store(scales + chunk * SCALES + 2, unread)
            tl.store(scales + chunk * SCALES + 3, unwrite)
        Aqk = tl.where(lower, tl.dot(qc, tl.trans(kc), input_precision=IP), 0.0).to(DT)
        Aqb = tl.where(lower, tl.dot(qc, tl.trans(bc), input_precision=IP), 0.0).to(DT)
        o = tl.dot(Aqk, vs, input_precision=IP) * (pair * unsv) + tl.dot(Aqb, us, input_precision=IP) * (pair * unsu)
        o += tl.dot(qc, hs, input_precision=IP) * (unread * unsh)
        store_tile(out, at_v, o, in_v, MASK_V)
        new = tl.dot(tl.trans(kc), vs, input_precision=IP) * (unwrite * unsv)
        new += tl.dot(tl.trans(bc), us, input_precision=IP) * (unwrite * unsu)
        h = h * tl.exp2(last)[:, None] + new * tl.exp2(last - m)[:, None]
    store_tile(hT, at_state, h, in_state, MASK_S)
