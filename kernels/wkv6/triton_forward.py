"""Triton kernels of the forward pass: the scan over the state, then the outputs of all chunks in parallel.

Dims: C chunk, K and V head dims, BK and BV tiles of them. Notation: README.md.
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
def scan_kernel(
    w, k, v, states, h0, hT, cu_seqlens, offsets, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, INITIAL: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [BK,BV] of the state of one head: h <- e^(decay of the chunk) h + (k e^(to its end))ᵀ v. Keeps every h."""
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
    if INITIAL:
        h = load_tile(h0, at_state, in_state, MASK_K or MASK_V).to(tl.float32)
    else:
        h = tl.zeros([BK, BV], tl.float32)
    for step in tl.range(0, count, num_stages=STAGES):
        token = first + step * C + i
        rows = step * C + i < length
        at_k = token[:, None] * (H * K) + head * K + x[None, :]
        in_k = rows[:, None] & (x < K)[None, :]
        wx = load_decay(w, at_k, in_k, TAIL or MASK_K)
        kx = load_tile(k, at_k, in_k, TAIL or MASK_K).to(tl.float32)
        at_v = token[:, None] * (H * V) + head * V + y[None, :]
        xv = load_tile(v, at_v, rows[:, None] & (y < V)[None, :], TAIL or MASK_V).to(DT)
        at_kv = ((slot + step) * H + head) * (K * V) + x[:, None] * V + y[None, :]
        store_tile(states, at_kv, h, in_state, MASK_K or MASK_V)
        kg = (kx * tl.exp(to_end(wx, C, AS_BF16, GATE))).to(DT)
        through = tl.exp(tl.sum(wx.to(tl.float32), 0))
        h = tl.dot(tl.trans(kg), xv, h * through[:, None], input_precision=IP)
    store_tile(hT, at_state, h, in_state, MASK_K or MASK_V)


@triton.jit(do_not_specialize=LENGTHS)
def out_kernel(
    r, w, k, v, states, out, cu_seqlens, offsets, num_sequences, T, num_chunks, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, AS_BF16: tl.constexpr, GATE: tl.constexpr,
    DT: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """BV value columns of one chunk: o = A v + (r e^(from its start)) h. Loops over BK keys."""
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
    A = tl.zeros([C, C], tl.float32)
    o = tl.zeros([C, BV], tl.float32)
    for start in tl.range(0, K, BK):
        x = start + tl.arange(0, BK)
        at_k = (first + i)[:, None] * (H * K) + head * K + x[None, :]
        in_k = rows[:, None] & (x < K)[None, :]
        wx = load_decay(w, at_k, in_k, MASK_K)
        rx = load_tile(r, at_k, in_k, MASK_K).to(tl.float32)
        kx = load_tile(k, at_k, in_k, MASK_K).to(tl.float32)
        c = centred_sums(wx, C, AS_BF16, GATE)
        X = tl.dot((rx * tl.exp(c)).to(DT), tl.trans((kx * tl.exp(-c)).to(DT)), input_precision=IP)
        A += tl.where(diagonal_pairs(i[:, None], i[None, :]), X, 0.0)
        for level in tl.static_range(LEVELS):
            f = tl.exp(level_sums(wx, BLOCK << level, C, AS_BF16, GATE))
            X = tl.dot((rx * f).to(DT), tl.trans((kx * f).to(DT)), input_precision=IP)
            A += tl.where(level_pairs(i[:, None], i[None, :], BLOCK << level), X, 0.0)
        at_kv = chunk * (K * V) + x[:, None] * V + y[None, :]
        h = load_tile(states, at_kv, (x < K)[:, None] & (y < V)[None, :], MASK_KV).to(DT)
        o = tl.dot((rx * tl.exp(from_start(wx, C, AS_BF16, GATE))).to(DT), h, o, input_precision=IP)
    at_v = (first + i)[:, None] * (H * V) + head * V + y[None, :]
    in_v = rows[:, None] & (y < V)[None, :]
    o = tl.dot(A.to(DT), load_tile(v, at_v, in_v, MASK_V).to(DT), o, input_precision=IP)
    store_tile(out, at_v, o, in_v, MASK_V)
