"""Triton kernels of the backward pass: the reverse scan, then the gradients of all chunks in parallel.

`values_kernel` solves for U and dX of a chunk and gives dv; `keys_kernel` gives dr, dk, da, db and the gradient of the
log decay for a tile of key columns. Never transposes the result of a dot: transposed products are computed with swapped
operands (transposing a dot's result into another dot is miscompiled by several Triton releases on Hopper).
"""

# ruff: noqa: SIM102 -- a compile-time condition must stay apart from a run-time one
from __future__ import annotations

import triton
import triton.language as tl

from radlads.kernels.shared.triton_tiles import LENGTHS, load_tile, locate, locate_sequence, store_tile
from radlads.kernels.wkv7.triton_gates import gates


@triton.jit(do_not_specialize=LENGTHS)
def scan_back_kernel(
    L, Q, decay, enter, dout, dstates, dhT, dh0, cu_seqlens, offsets, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, RT: tl.constexpr, IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BV columns of one head, backwards: dh <- decay dh + Lᵀ dh + Qᵀ do. Keeps e^(last - m) dh after every chunk."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    tile, n, head = program % TILES, program // TILES // H, program // TILES % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    i, x, y = tl.arange(0, C), tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    MASK_K: tl.constexpr = K != BK
    MASK_V: tl.constexpr = V % BV != 0
    at_state = (n * H + head) * (K * V) + x[:, None] * V + y[None, :]
    in_state = (x < K)[:, None] & (y < V)[None, :]
    dh = load_tile(dhT, at_state, in_state, MASK_K or MASK_V).to(tl.float32)
    for back in tl.range(0, count, num_stages=STAGES):
        step = count - 1 - back
        chunk = (slot + step) * H + head
        token = first + step * C + i
        rows = step * C + i < length
        Lx = load_tile(L, chunk * (K * K) + x[:, None] * K + x[None, :], (x < K)[:, None] & (x < K)[None, :], MASK_K)
        Qx = load_tile(
            Q, token[:, None] * (H * K) + head * K + x[None, :], rows[:, None] & (x < K)[None, :], TAIL or MASK_K
        )
        do = load_tile(
            dout, token[:, None] * (H * V) + head * V + y[None, :], rows[:, None] & (y < V)[None, :], TAIL or MASK_V
        )
        last = load_tile(decay, chunk * K + x, x < K, MASK_K)
        m = load_tile(enter, chunk * K + x, x < K, MASK_K)
        at_kv = chunk * (K * V) + x[:, None] * V + y[None, :]
        store_tile(dstates, at_kv, dh * tl.exp2(last - m)[:, None], in_state, MASK_K or MASK_V)
        dhx = dh.to(RT)
        dh = tl.dot(tl.trans(Lx.to(RT)), dhx, dh * tl.exp2(last)[:, None], input_precision=IP)
        dh = tl.dot(tl.trans(Qx.to(RT)), do.to(RT), dh, input_precision=IP)
    store_tile(dh0, at_state, dh, in_state, MASK_K or MASK_V)


@triton.jit(do_not_specialize=LENGTHS)
def values_kernel(
    r, w, k, v, a, b, dout, states, dstates, inverse, U, X, dv, cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, CUMULATE_BY_DOT: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """BV value columns of one chunk: U = T (Aak v + ac h), X = dX = Tᵀ (Aqbᵀ do + bc l), dv. Loops over BK keys."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    tile, chunk = program % TILES, program // TILES
    slot, head = chunk // H, chunk % H
    if PACKED:
        if slot >= tl.load(offsets + num_sequences).to(tl.int64):
            return
    first, length = locate(slot, cu_seqlens, offsets, num_sequences, T, num_chunks, C, PACKED)
    i, y = tl.arange(0, C), tile * BV + tl.arange(0, BV)
    MASK_K: tl.constexpr = TAIL or K % BK != 0
    MASK_V: tl.constexpr = TAIL or V % BV != 0
    MASK_KV: tl.constexpr = (K % BK != 0) or (V % BV != 0)
    token = first + i
    rows = i < length
    Aak = tl.zeros([C, C], tl.float32)
    AakT = tl.zeros([C, C], tl.float32)
    AqkT = tl.zeros([C, C], tl.float32)
    AqbT = tl.zeros([C, C], tl.float32)
    u = tl.zeros([C, BV], tl.float32)
    du = tl.zeros([C, BV], tl.float32)
    acc = tl.zeros([C, BV], tl.float32)
    for start in tl.range(0, K, BK):
        x = start + tl.arange(0, BK)
        at_k = token[:, None] * (H * K) + head * K + x[None, :]
        in_k = rows[:, None] & (x < K)[None, :]
        g, ge, m, _ = gates(load_tile(w, at_k, in_k, MASK_K), C, C // 2 + 1, CUMULATE_BY_DOT)
        write = tl.exp2(m[None, :] - g)
        ac = (load_tile(a, at_k, in_k, MASK_K) * tl.exp2(ge - m[None, :])).to(DT)
        kc = (load_tile(k, at_k, in_k, MASK_K) * write).to(DT)
        bc = (load_tile(b, at_k, in_k, MASK_K) * write).to(DT)
        qc = (load_tile(r, at_k, in_k, MASK_K) * tl.exp2(g - m[None, :])).to(DT)
        at_kv = chunk * (K * V) + x[:, None] * V + y[None, :]
        in_kv = (x < K)[:, None] & (y < V)[None, :]
        h = load_tile(states, at_kv, in_kv, MASK_KV).to(DT)
        dh = load_tile(dstates, at_kv, in_kv, MASK_KV).to(DT)
        Aak = tl.dot(ac, tl.trans(kc), Aak, input_precision=IP)
        AakT = tl.dot(kc, tl.trans(ac), AakT, input_precision=IP)
        AqkT = tl.dot(kc, tl.trans(qc), AqkT, input_precision=IP)
        AqbT = tl.dot(bc, tl.trans(qc), AqbT, input_precision=IP)
        u = tl.dot(ac, h, u, input_precision=IP)
        du = tl.dot(bc, dh, du, input_precision=IP)
        acc = tl.dot(kc, dh, acc, input_precision=IP)
    strict = i[:, None] > i[None, :]
    later = i[:, None] < i[None, :]
    upper = i[:, None] <= i[None, :]
    at_v = token[:, None] * (H * V) + head * V + y[None, :]
    in_v = rows[:, None] & (y < V)[None, :]
    xv = load_tile(v, at_v, in_v, MASK_V).to(DT)
    do = load_tile(dout, at_v, in_v, MASK_V).to(DT)
    at_inv = chunk * (C * C) + i[:, None] * C + i[None, :]
    at_invT = chunk * (C * C) + i[None, :] * C + i[:, None]
    u = tl.dot(tl.where(strict, Aak, 0.0).to(DT), xv, u, input_precision=IP)
    u = tl.dot(tl.load(inverse + at_inv).to(DT), u.to(DT), input_precision=IP)
    store_tile(U, at_v, u, in_v, MASK_V)
    du = tl.dot(tl.where(upper, AqbT, 0.0).to(DT), do, du, input_precision=IP)
    dx = tl.dot(tl.load(inverse + at_invT).to(DT), du.to(DT), input_precision=IP)
    store_tile(X, at_v, dx, in_v, MASK_V)
    acc = tl.dot(tl.where(upper, AqkT, 0.0).to(DT), do, acc, input_precision=IP)
    acc = tl.dot(tl.where(later, AakT, 0.0).to(DT), dx.to(DT), acc, input_precision=IP)
    store_tile(dv, at_v, acc, in_v, MASK_V)


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    r, w, k, v, a, b, dout, states, dstates, U, X, dr, dw, dk, da, db,
    cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, CUMULATE_BY_DOT: tl.constexpr,
    DT: tl.constexpr, RT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """BK key columns of one chunk: dr, dk, da, db, d log decay. Loops over tiles of BV values.

    Pairs of r with the k and b of its own token are added last (`same_k`, `same_b`): no decay lies between them.
    """
    TILES: tl.constexpr = (K + BK - 1) // BK
    program = tl.program_id(0).to(tl.int64)
    tile, chunk = program % TILES, program // TILES
    slot, head = chunk // H, chunk % H
    if PACKED:
        if slot >= tl.load(offsets + num_sequences).to(tl.int64):
            return
    first, length = locate(slot, cu_seqlens, offsets, num_sequences, T, num_chunks, C, PACKED)
    i, x = tl.arange(0, C), tile * BK + tl.arange(0, BK)
    MASK_K: tl.constexpr = TAIL or K % BK != 0
    MASK_V: tl.constexpr = TAIL or V % BV != 0
    MASK_KV: tl.constexpr = (K % BK != 0) or (V % BV != 0)
    token = first + i
    rows = i < length
    at_k = token[:, None] * (H * K) + head * K + x[None, :]
    in_k = rows[:, None] & (x < K)[None, :]
    strict = i[:, None] > i[None, :]
    later = i[:, None] < i[None, :]

    # reads: values that r and a read from earlier writes and from the state
    dqk = tl.zeros([C, C], tl.float32)
    dqb = tl.zeros([C, C], tl.float32)
    dak = tl.zeros([C, C], tl.float32)
    dab = tl.zeros([C, C], tl.float32)
    same_k = tl.zeros([C], tl.float32)
    same_b = tl.zeros([C], tl.float32)
    zq = tl.zeros([C, BK], tl.float32)
    za = tl.zeros([C, BK], tl.float32)
    for start in tl.range(0, V, BV):
        y = start + tl.arange(0, BV)
        at_v = token[:, None] * (H * V) + head * V + y[None, :]
        in_v = rows[:, None] & (y < V)[None, :]
        do = load_tile(dout, at_v, in_v, MASK_V).to(RT)
        dx = load_tile(X, at_v, in_v, MASK_V).to(RT)
        xv = load_tile(v, at_v, in_v, MASK_V).to(RT)
        u = load_tile(U, at_v, in_v, MASK_V).to(RT)
        h = load_tile(
            states, chunk * (K * V) + x[:, None] * V + y[None, :], (x < K)[:, None] & (y < V)[None, :], MASK_KV
        ).to(RT)
        same_k += tl.sum(do.to(tl.float32) * xv.to(tl.float32), 1)
        same_b += tl.sum(do.to(tl.float32) * u.to(tl.float32), 1)
        dqk = tl.dot(do, tl.trans(xv), dqk, input_precision=IP)
        dqb = tl.dot(do, tl.trans(u), dqb, input_precision=IP)
        dak = tl.dot(dx, tl.trans(xv), dak, input_precision=IP)
        dab = tl.dot(dx, tl.trans(u), dab, input_precision=IP)
        zq = tl.dot(do, tl.trans(h), zq, input_precision=IP)
        za = tl.dot(dx, tl.trans(h), za, input_precision=IP)
    g, ge, m, _ = gates(load_tile(w, at_k, in_k, MASK_K), C, C // 2 + 1, CUMULATE_BY_DOT)
    write = tl.exp2(m[None, :] - g)
    read = tl.exp2(g - m[None, :])
    read_a = tl.exp2(ge - m[None, :])
    kc = load_tile(k, at_k, in_k, MASK_K) * write
    bc = load_tile(b, at_k, in_k, MASK_K) * write
    qc = load_tile(r, at_k, in_k, MASK_K) * read
    ac = load_tile(a, at_k, in_k, MASK_K) * read_a
    zq = tl.dot(tl.where(strict, dqk, 0.0).to(DT), kc.to(DT), zq, input_precision=IP)
    zq = tl.dot(tl.where(strict, dqb, 0.0).to(DT), bc.to(DT), zq, input_precision=IP)
    pairs = qc * zq
    zq += same_k[:, None] * kc + same_b[:, None] * bc
    store_tile(dr, at_k, zq * read, in_k, MASK_K)
    za = tl.dot(tl.where(strict, dak, 0.0).to(DT), kc.to(DT), za, input_precision=IP)
    za = tl.dot(tl.where(strict, dab, 0.0).to(DT), bc.to(DT), za, input_precision=IP)
    store_tile(da, at_k, za * read_a, in_k, MASK_K)
    reading = ac * za
    grad = tl.cumsum(pairs + reading, 0, reverse=True) - reading

    # writes: contributions of k and b to later reads and to the state
    dqkT = tl.zeros([C, C], tl.float32)
    dqbT = tl.zeros([C, C], tl.float32)
    dakT = tl.zeros([C, C], tl.float32)
    dabT = tl.zeros([C, C], tl.float32)
    passed = tl.zeros([BK], tl.float32)
    yk = tl.zeros([C, BK], tl.float32)
    yb = tl.zeros([C, BK], tl.float32)
    for start in tl.range(0, V, BV):
        y = start + tl.arange(0, BV)
        at_v = token[:, None] * (H * V) + head * V + y[None, :]
        in_v = rows[:, None] & (y < V)[None, :]
        do = load_tile(dout, at_v, in_v, MASK_V).to(RT)
        dx = load_tile(X, at_v, in_v, MASK_V).to(RT)
        xv = load_tile(v, at_v, in_v, MASK_V).to(RT)
        u = load_tile(U, at_v, in_v, MASK_V).to(RT)
        at_kv = chunk * (K * V) + x[:, None] * V + y[None, :]
        in_kv = (x < K)[:, None] & (y < V)[None, :]
        h = load_tile(states, at_kv, in_kv, MASK_KV)
        dh = load_tile(dstates, at_kv, in_kv, MASK_KV).to(RT)
        passed += tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1)
        dqkT = tl.dot(xv, tl.trans(do), dqkT, input_precision=IP)
        dakT = tl.dot(xv, tl.trans(dx), dakT, input_precision=IP)
        dqbT = tl.dot(u, tl.trans(do), dqbT, input_precision=IP)
        dabT = tl.dot(u, tl.trans(dx), dabT, input_precision=IP)
        yk = tl.dot(xv, tl.trans(dh), yk, input_precision=IP)
        yb = tl.dot(u, tl.trans(dh), yb, input_precision=IP)
    leaving = kc * yk + bc * yb
    inside = tl.dot(tl.where(later, dqkT, 0.0).to(DT), qc.to(DT), input_precision=IP)
    inside = tl.dot(tl.where(later, dakT, 0.0).to(DT), ac.to(DT), inside, input_precision=IP)
    pairs = kc * inside
    store_tile(dk, at_k, (inside + yk + same_k[:, None] * qc) * write, in_k, MASK_K)
    inside = tl.dot(tl.where(later, dqbT, 0.0).to(DT), qc.to(DT), input_precision=IP)
    inside = tl.dot(tl.where(later, dabT, 0.0).to(DT), ac.to(DT), inside, input_precision=IP)
    pairs += bc * inside
    store_tile(db, at_k, (inside + yb + same_b[:, None] * qc) * write, in_k, MASK_K)
    grad += tl.cumsum(leaving, 0) - leaving - tl.cumsum(pairs, 0, reverse=True) + passed[None, :]
    store_tile(dw, at_k, grad, in_k, MASK_K)
