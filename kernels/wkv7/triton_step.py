"""One token in Triton: the state [K,V] of a head is read and written once, in place. Bound by memory traffic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radlads.kernels.shared.triton_launch import cdiv, power_of_two
from radlads.kernels.shared.triton_tiles import load_tile, store_tile


@triton.jit
def step_kernel(
    r, w, k, v, a, b, state, out,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr = False,
):  # fmt: skip
    """BV columns of the state of one head of one sequence. DELTA: a and b are the removal key and its learning rate."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    head, tile = program // TILES, program % TILES
    x, y = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    MASK_K: tl.constexpr = K != BK
    MASK_V: tl.constexpr = V % BV != 0
    at = head * (K * V) + x[:, None] * V + y[None, :]
    inside = (x < K)[:, None] & (y < V)[None, :]
    # The small loads first: they overlap with the load of the state, which is far larger than any cache.
    reads = load_tile(a, head * K + x, x < K, MASK_K).to(tl.float32)
    decay = tl.exp(load_tile(w, head * K + x, x < K, MASK_K).to(tl.float32))
    removal = load_tile(b, head * K + x, x < K, MASK_K).to(tl.float32)
    key = load_tile(k, head * K + x, x < K, MASK_K).to(tl.float32)
    value = load_tile(v, head * V + y, y < V, MASK_V).to(tl.float32)
    if DELTA:
        removal *= reads
        reads = -reads
    query = load_tile(r, head * K + x, x < K, MASK_K).to(tl.float32)
    if MASK_K or MASK_V:
        h = tl.load(state + at, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        h = tl.load(state + at, eviction_policy="evict_first")
    read = tl.sum(h * reads[:, None], 0)
    h = h * decay[:, None] + removal[:, None] * read[None, :] + key[:, None] * value[None, :]
    if MASK_K or MASK_V:
        tl.store(state + at, h, mask=inside, eviction_policy="evict_first")
    else:
        tl.store(state + at, h, eviction_policy="evict_first")
    store_tile(out, head * V + y, tl.sum(h * query[:, None], 0), y < V, MASK_V)


@torch.no_grad()
def wkv7_step_triton(
    r_BHK: Tensor,
    log_decay_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    a_BHK: Tensor,
    b_BHK: Tensor,
    state_BHKV: Tensor,
    *,
    delta: bool = False,
    values: int | None = None,
    warps: int | None = None,
) -> Tensor:
    """As `wkv7_step`, or with `delta` as `wkv7_delta_step` (a is kk, b is iclr), for a contiguous fp32 state. `values`
    (columns per program) and `warps` tune the launch."""
    B, H, K, V = state_BHKV.shape
    power = max(16, power_of_two(V))
    masked = power_of_two(K) != K  # narrow tiles with one warp were the fastest there
    # Whole heads reach the highest bandwidth; narrower tiles distribute few heads over the GPU.
    tile = min(power, values or (32 if masked else 128 if K <= 128 and B * H >= 512 else 64))
    warps = warps or (1 if masked else 4)
    out = torch.empty_like(v_BHV, memory_format=torch.contiguous_format)
    inputs = (x.contiguous() for x in (r_BHK, log_decay_BHK, k_BHK, v_BHV, a_BHK, b_BHK))
    step_kernel[(B * H * cdiv(V, tile),)](
        *inputs,
        state_BHKV,
        out,
        K=K,
        V=V,
        BK=power_of_two(K),
        BV=tile,
        DELTA=delta,
        num_warps=warps,
    )
    return out
