"""Triton kernels of the backward pass: the reverse scan, then the gradients of all chunks in parallel.

Transposed products are computed with swapped operands: transposing a dot's result into another dot is miscompiled by
several Triton releases on Hopper.
"""

# ruff: noqa: SIM102 -- a compile-time condition must stay apart from a run-time one
from __future__ import annotations

import triton
import triton.language as tl

from radlads.kernels.shared.triton_tiles import LENGTHS, load_tile, locate, locate_sequence, store_tile
from radlads.kernels.wkv6.triton_gates import (
    BLOCK,
    centred_sums,
    diagonal_pairs,
    from_start,
    level_pairs,
    level_sums,
    load_decay,
    to_end,
)


@triton.jit(do_not_specialize=LENGTHS)
def scan_back_kernel(
    r, w, dout, dstates, dhT, dh0, cu_seqlens, offsets, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of the state's gradient, backwards: dh <- e^(decay) dh + (r e^(from start))ᵀ do. Keeps dh after chunks."""
    TILES_K: tl.constexpr = (K + BK - 1) // BK
    TILES_V: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    tile_v, tile_k = program % TILES_V, program // TILES_V % TILES_K
    n, head = program // (TILES_V * TILES_K) // H, program // (TILES_V * TILES_K) % H
    first, length, slot, count = locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED)
    i, x, y = tl.arange(0, C), tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    MASK_K: tl.constexpr = K % BK != 0
    MASK_V: tl.constexpr = V % BV != 0
    at_state = (n * H + head) * (K * V) + x[:, None] * V + y[None, :]
    in_state = (x < K)[:, None] & (y < V)[None, :]
    dh = load_tile(dhT, at_state, in_state, MASK_K or MASK_V).to(tl.float32)
    for back in tl.range(0, count, num_stages=STAGES):
        step = count - 1 - back
        token = first + step * C + i
        rows = step * C + i < length
        at_k = token[:, None] * (H * K) + head * K + x[None, :]
        in_k = rows[:, None] & (x < K)[None, :]
        wx = load_decay(w, at_k, in_k, TAIL or MASK_K)
        rx = load_tile(r, at_k, in_k, TAIL or MASK_K).to(tl.float32)
        at_v = token[:, None] * (H * V) + head * V + y[None, :]
        do = load_tile(dout, at_v, rows[:, None] & (y < V)[None, :], TAIL or MASK_V).to(DT)
        at_kv = ((slot + step) * H + head) * (K * V) + x[:, None] * V + y[None, :]
        store_tile(dstates, at_kv, dh, in_state, MASK_K or MASK_V)
        rg = (rx * tl.exp(from_start(wx, C, AS_BF16, GATE))).to(DT)
        through = tl.exp(tl.sum(wx.to(tl.float32), 0))
        dh = tl.dot(tl.trans(rg), do, dh * through[:, None], input_precision=IP)
    store_tile(dh0, at_state, dh, in_state, MASK_K or MASK_V)


@triton.jit(do_not_specialize=LENGTHS)
def values_kernel(
    r, w, k, dout, dstates, dv, cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """BV value columns of one chunk: dv = Aᵀ do + (k e^(to its end)) dh. Loops over BK keys."""
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
    rows = i < length
    AT = tl.zeros([C, C], tl.float32)
    acc = tl.zeros([C, BV], tl.float32)
    for start in tl.range(0, K, BK):
        x = start + tl.arange(0, BK)
        at_k = (first + i)[:, None] * (H * K) + head * K + x[None, :]
        in_k = rows[:, None] & (x < K)[None, :]
        wx = load_decay(w, at_k, in_k, MASK_K)
        rx = load_tile(r, at_k, in_k, MASK_K).to(tl.float32)
        kx = load_tile(k, at_k, in_k, MASK_K).to(tl.float32)
        c = centred_sums(wx, C, AS_BF16, GATE)
        X = tl.dot((kx * tl.exp(-c)).to(DT), tl.trans((rx * tl.exp(c)).to(DT)), input_precision=IP)
        AT += tl.where(diagonal_pairs(i[None, :], i[:, None]), X, 0.0)
        for level in tl.static_range(LEVELS):
            f = tl.exp(level_sums(wx, BLOCK << level, C, AS_BF16, GATE))
            X = tl.dot((kx * f).to(DT), tl.trans((rx * f).to(DT)), input_precision=IP)
            AT += tl.where(level_pairs(i[None, :], i[:, None], BLOCK << level), X, 0.0)
        at_kv = chunk * (K * V) + x[:, None] * V + y[None, :]
        dh = load_tile(dstates, at_kv, (x < K)[:, None] & (y < V)[None, :], MASK_KV).to(DT)
        acc = tl.dot((kx * tl.exp(to_end(wx, C, AS_BF16, GATE))).to(DT), dh, acc, input_precision=IP)
    at_v = (first + i)[:, None] * (H * V) + head * V + y[None, :]
    in_v = rows[:, None] & (y < V)[None, :]
    acc = tl.dot(AT.to(DT), load_tile(dout, at_v, in_v, MASK_V).to(DT), acc, input_precision=IP)
    store_tile(dv, at_v, acc, in_v, MASK_V)


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    r, w, k, v, dout, states, dstates, dr, dw, dk, cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr,
    DT: tl.constexpr, RT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """BK key columns of one chunk: dr, dk, d log decay. Loops over tiles of BV values.

    Pairs of r with the k of its own token are added last (`same`): no decay lies between them.
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
    rows = i < length
    dA = tl.zeros([C, C], tl.float32)
    dAT = tl.zeros([C, C], tl.float32)
    same = tl.zeros([C], tl.float32)
    passed = tl.zeros([BK], tl.float32)
    entered = tl.zeros([C, BK], tl.float32)
    left = tl.zeros([C, BK], tl.float32)
    for start in tl.range(0, V, BV):
        y = start + tl.arange(0, BV)
        at_v = (first + i)[:, None] * (H * V) + head * V + y[None, :]
        in_v = rows[:, None] & (y < V)[None, :]
        do = load_tile(dout, at_v, in_v, MASK_V).to(RT)
        xv = load_tile(v, at_v, in_v, MASK_V).to(RT)
        at_kv = chunk * (K * V) + x[:, None] * V + y[None, :]
        in_kv = (x < K)[:, None] & (y < V)[None, :]
        h = load_tile(states, at_kv, in_kv, MASK_KV).to(RT)
        dh = load_tile(dstates, at_kv, in_kv, MASK_KV).to(RT)
        same += tl.sum(do.to(tl.float32) * xv.to(tl.float32), 1)
        passed += tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1)
        dA = tl.dot(do, tl.trans(xv), dA, input_precision=IP)
        dAT = tl.dot(xv, tl.trans(do), dAT, input_precision=IP)
        entered = tl.dot(do, tl.trans(h), entered, input_precision=IP)
        left = tl.dot(xv, tl.trans(dh), left, input_precision=IP)
    at_k = (first + i)[:, None] * (H * K) + head * K + x[None, :]
    in_k = rows[:, None] & (x < K)[None, :]
    wx = load_decay(w, at_k, in_k, MASK_K)
    rx = load_tile(r, at_k, in_k, MASK_K).to(tl.float32)
    kx = load_tile(k, at_k, in_k, MASK_K).to(tl.float32)
    read = entered * tl.exp(from_start(wx, C, AS_BF16, GATE))
    left *= tl.exp(to_end(wx, C, AS_BF16, GATE))
    c = centred_sums(wx, C, AS_BF16, GATE)
    up = tl.exp(c)
    down = tl.exp(-c)
    other = i[:, None] != i[None, :]
    pairs = diagonal_pairs(i[:, None], i[None, :]) & other
    read += up * tl.dot(tl.where(pairs, dA, 0.0).to(DT), (kx * down).to(DT), input_precision=IP)
    pairs = diagonal_pairs(i[None, :], i[:, None]) & other
    write = down * tl.dot(tl.where(pairs, dAT, 0.0).to(DT), (rx * up).to(DT), input_precision=IP)
    for level in tl.static_range(LEVELS):
        f = tl.exp(level_sums(wx, BLOCK << level, C, AS_BF16, GATE))
        pairs = level_pairs(i[:, None], i[None, :], BLOCK << level)
        read += f * tl.dot(tl.where(pairs, dA, 0.0).to(DT), (kx * f).to(DT), input_precision=IP)
        pairs = level_pairs(i[None, :], i[:, None], BLOCK << level)
        write += f * tl.dot(tl.where(pairs, dAT, 0.0).to(DT), (rx * f).to(DT), input_precision=IP)
    store_tile(dr, at_k, read + same[:, None] * kx, in_k, MASK_K)
    store_tile(dk, at_k, write + left + same[:, None] * rx, in_k, MASK_K)
    leaving = kx * left
    passed *= tl.exp(tl.sum(wx.to(tl.float32), 0))
    grad = tl.cumsum(rx * read - kx * write, 0, reverse=True) + tl.cumsum(leaving, 0) - leaving + passed[None, :]
    store_tile(dw, at_k, grad, in_k, MASK_K)
