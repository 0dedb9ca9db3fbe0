"""Triton kernels of the forward pass: the terms of all chunks in parallel, then the scan over the state.

Dims: C chunk, K and V head dims, BK and BV the powers of two that hold them (or tiles of them). Notation: README.md.
"""

# ruff: noqa: SIM102 -- a compile-time condition must stay apart from a run-time one
from __future__ import annotations

import triton
import triton.language as tl

from radlads.kernels.shared.triton_tiles import LENGTHS, load_tile, locate, locate_sequence, store_tile
from radlads.kernels.wkv7.triton_gates import gates, unit_lower_inverse


@triton.jit(do_not_specialize=LENGTHS)
def terms_kernel(
    r, w, k, v, a, b, L, N, Q, partial, decay, enter, inverse, cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, STORE: tl.constexpr, CUMULATE_BY_DOT: tl.constexpr,
    DT: tl.constexpr, TT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: L [K,K], N [K,V], Q [C,K], partial [C,V], log2 decay and entry [K], T [C,C] (if STORE)."""
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // H, program % H
    if PACKED:
        if slot >= tl.load(offsets + num_sequences).to(tl.int64):
            return
    first, length = locate(slot, cu_seqlens, offsets, num_sequences, T, num_chunks, C, PACKED)
    i, x, y = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    MASK_K: tl.constexpr = TAIL or K != BK
    MASK_V: tl.constexpr = TAIL or V != BV
    at_k = (first + i)[:, None] * (H * K) + head * K + x[None, :]
    at_v = (first + i)[:, None] * (H * V) + head * V + y[None, :]
    in_k = (i < length)[:, None] & (x < K)[None, :]
    in_v = (i < length)[:, None] & (y < V)[None, :]

    g, ge, m, last = gates(load_tile(w, at_k, in_k, MASK_K), C, C // 2 + 1, CUMULATE_BY_DOT)
    store_tile(decay, program * K + x, last, x < K, K != BK)
    if STORE:
        store_tile(enter, program * K + x, m, x < K, K != BK)
    write = tl.exp2(m[None, :] - g)
    ac = (load_tile(a, at_k, in_k, MASK_K) * tl.exp2(ge - m[None, :])).to(DT)
    bc = (load_tile(b, at_k, in_k, MASK_K) * write).to(DT)
    strict = i[:, None] > i[None, :]
    j = tl.arange(0, 16)
    A = tl.where(strict, tl.dot(ac, tl.trans(bc), input_precision=IP), 0.0)
    blocks = tl.dot(
        tl.reshape(ac, [C // 16, 16, BK]),
        tl.permute(tl.reshape(bc, [C // 16, 16, BK]), (0, 2, 1)),
        input_precision=IP,
    )
    blocks = tl.where((j[:, None] > j[None, :])[None, :, :], blocks, 0.0)
    inv = unit_lower_inverse(blocks, A, C, LEVELS, TT, IP)
    if STORE:
        store_tile(inverse, program * C * C + i[:, None] * C + i[None, :], inv, True, False)
    inv = inv.to(TT).to(DT)
    kc = (load_tile(k, at_k, in_k, MASK_K) * write).to(DT)
    leave = tl.exp2(last - m)[:, None]
    bcT = tl.trans(bc)
    lower = i[:, None] >= i[None, :]
    if BK > 128 or BV > 128:  # a tile of columns at a time: whole, [K,K] would not fit the registers
        qc = (load_tile(r, at_k, in_k, MASK_K) * tl.exp2(g - m[None, :])).to(DT)
        Aak = tl.where(strict, tl.dot(ac, tl.trans(kc), input_precision=IP), 0.0).to(DT)
        Aqb = tl.where(lower, tl.dot(qc, bcT, input_precision=IP), 0.0).to(DT)
        Aqk = tl.where(lower, tl.dot(qc, tl.trans(kc), input_precision=IP), 0.0).to(DT)
        for tile in tl.static_range(BK // 64):
            z = tile * 64 + tl.arange(0, 64)
            at_z = (first + i)[:, None] * (H * K) + head * K + z[None, :]
            in_z = (i < length)[:, None] & (z < K)[None, :]
            gz, gez, mz, _ = gates(load_tile(w, at_z, in_z, MASK_K), C, C // 2 + 1, CUMULATE_BY_DOT)
            az = (load_tile(a, at_z, in_z, MASK_K) * tl.exp2(gez - mz[None, :])).to(DT)
            W = tl.dot(inv, az, input_precision=IP).to(DT)
            come = tl.exp2(mz)[None, :]
            step = tl.dot(bcT, W, input_precision=IP) * leave * come
            at_kz = program * (K * K) + x[:, None] * K + z[None, :]
            store_tile(L, at_kz, step, (x < K)[:, None] & (z < K)[None, :], K != BK)
            qz = load_tile(r, at_z, in_z, MASK_K) * tl.exp2(gz - mz[None, :])
            store_tile(Q, at_z, tl.dot(Aqb, W, qz.to(tl.float32), input_precision=IP) * come, in_z, MASK_K)
        for tile in tl.static_range(BV // 64):
            z = tile * 64 + tl.arange(0, 64)
            at_z = (first + i)[:, None] * (H * V) + head * V + z[None, :]
            in_z = (i < length)[:, None] & (z < V)[None, :]
            xv = load_tile(v, at_z, in_z, MASK_V).to(DT)
            U = tl.dot(inv, tl.dot(Aak, xv, input_precision=IP).to(DT), input_precision=IP).to(DT)
            new = tl.dot(bcT, U, tl.dot(tl.trans(kc), xv, input_precision=IP), input_precision=IP) * leave
            at_kz = program * (K * V) + x[:, None] * V + z[None, :]
            store_tile(N, at_kz, new, (x < K)[:, None] & (z < V)[None, :], (K != BK) or (V != BV))
            out = tl.dot(Aqb, U, tl.dot(Aqk, xv, input_precision=IP), input_precision=IP)
            store_tile(partial, at_z, out, in_z, MASK_V)
    else:
        W = tl.dot(inv, ac, input_precision=IP).to(DT)
        xv = load_tile(v, at_v, in_v, MASK_V).to(DT)
        Aak = tl.where(strict, tl.dot(ac, tl.trans(kc), input_precision=IP), 0.0).to(DT)
        U = tl.dot(inv, tl.dot(Aak, xv, input_precision=IP).to(DT), input_precision=IP).to(DT)
        come = tl.exp2(m)[None, :]
        step = tl.dot(bcT, W, input_precision=IP) * leave * come
        at_kk = program * (K * K) + x[:, None] * K + x[None, :]
        store_tile(L, at_kk, step, (x < K)[:, None] & (x < K)[None, :], K != BK)
        new = tl.dot(bcT, U, tl.dot(tl.trans(kc), xv, input_precision=IP), input_precision=IP) * leave
        at_kv = program * (K * V) + x[:, None] * V + y[None, :]
        store_tile(N, at_kv, new, (x < K)[:, None] & (y < V)[None, :], (K != BK) or (V != BV))

        qc = load_tile(r, at_k, in_k, MASK_K) * tl.exp2(g - m[None, :])
        Aqb = tl.where(lower, tl.dot(qc.to(DT), tl.trans(bc), input_precision=IP), 0.0).to(DT)
        Aqk = tl.where(lower, tl.dot(qc.to(DT), tl.trans(kc), input_precision=IP), 0.0).to(DT)
        store_tile(Q, at_k, tl.dot(Aqb, W, qc.to(tl.float32), input_precision=IP) * come, in_k, MASK_K)
        out = tl.dot(Aqb, U, tl.dot(Aqk, xv, input_precision=IP), input_precision=IP)
        store_tile(partial, at_v, out, in_v, MASK_V)


@triton.jit(do_not_specialize=LENGTHS)
def scan_kernel(
    L, N, Q, partial, decay, enter, out, states, h0, hT, cu_seqlens, offsets, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr, STORE: tl.constexpr,
    RT: tl.constexpr, IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BV columns of one head: o = partial + Q h, h <- decay h + L h + N. Keeps e^m h before every chunk (if STORE)."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    tile, n, head = program % TILES, program // TILES // H, program // TILES % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    i, x, y = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    MASK_K: tl.constexpr = K != BK
    MASK_V: tl.constexpr = V % BV != 0
    at_state = (n * H + head) * (K * V) + x[:, None] * V + y[None, :]
    in_state = (x < K)[:, None] & (y < V)[None, :]
    if INITIAL:
        h = load_tile(h0, at_state, in_state, MASK_K or MASK_V).to(tl.float32)
    else:
        h = tl.zeros([BK, BV], tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        chunk = (slot + step) * H + head
        token = first + step * C + i
        rows = step * C + i < length
        Lx = load_tile(L, chunk * (K * K) + x[:, None] * K + x[None, :], (x < K)[:, None] & (x < K)[None, :], MASK_K)
        Qx = load_tile(
            Q, token[:, None] * (H * K) + head * K + x[None, :], rows[:, None] & (x < K)[None, :], TAIL or MASK_K
        )
        at_kv = chunk * (K * V) + x[:, None] * V + y[None, :]
        Nx = load_tile(N, at_kv, in_state, MASK_K or MASK_V).to(tl.float32)
        at_o = token[:, None] * (H * V) + head * V + y[None, :]
        in_o = rows[:, None] & (y < V)[None, :]
        px = load_tile(partial, at_o, in_o, TAIL or MASK_V).to(tl.float32)
        through = tl.exp2(load_tile(decay, chunk * K + x, x < K, MASK_K))
        if STORE:
            come = tl.exp2(load_tile(enter, chunk * K + x, x < K, MASK_K))
            store_tile(states, at_kv, h * come[:, None], in_state, MASK_K or MASK_V)
        hx = h.to(RT)
        store_tile(out, at_o, tl.dot(Qx.to(RT), hx, px, input_precision=IP), in_o, TAIL or MASK_V)
        h = tl.dot(Lx.to(RT), hx, h * through[:, None] + Nx, input_precision=IP)
    store_tile(hT, at_state, h, in_state, MASK_K or MASK_V)
