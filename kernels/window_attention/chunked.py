"""Windowed softmax attention with sinks in plain torch, block by block in O(T·W) (README.md).

Dims: B batch, T time, H query heads, G kv heads, R = H/G, K key dim, V value dim per head, S sinks, W window,
C tokens of a block, M blocks, N packed sequences.

Needs torch only, so that an exported model can carry it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]
"""memory [B,G,S+W,K+V] in the keys' dtype, seen [B] int64."""


class _Blocks(NamedTuple):
    """Where the blocks of queries lie."""

    queries: Tensor
    """[M,C], places in the flattened tokens; any place beyond a sequence's end."""
    keys: Tensor
    """[M,W+C], places among the keys, which have W before each row's first."""
    first: Tensor
    """[M], the number in its sequence of a block's first token."""
    owner: Tensor
    """[M], the sequence of a block."""
    outputs: Tensor
    """[tokens], where each token's output is among [M·C]."""


def window_attention_chunked(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    keep_BT: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """As `window_attention`; scores and sums as torch's attention computes them in the inputs' dtype."""
    (B, T, H, _), G, kv = q_BTHK.shape, k_BTGK.shape[2], torch.cat([k_BTGK, v_BTGV], -1)
    back = None
    if keep_BT is not None:  # tokens that count go first, so that a window is a range of places
        order = keep_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        q_BTHK, kv = (_rows(x, order) for x in (q_BTHK, kv))
    memory, seen = empty_state(kv, sinks + window) if initial_state is None else initial_state
    # Without tokens from before, a window beyond the row would only add keys that do not exist to every block.
    near = window if initial_state is not None else min(window, T)
    ring = _in_order(memory, seen, sinks, near).to(kv.dtype)  # [B,W,G,K+V]
    C = min(window, T)
    if cu_seqlens is None:
        blocks = _dense_blocks(B, T, C, near, seen)
        firsts = _first_tokens(kv, memory, seen, sinks)  # [B,S,G,K+V]
    else:
        blocks = _packed_blocks(cu_seqlens, C, near)
        places = cu_seqlens[:-1, None].long() + torch.arange(sinks, device=kv.device)
        firsts = kv[0, places.clamp(max=T - 1)]
    extended = torch.cat([ring, kv], 1).flatten(0, 1)
    wide = torch.promote_types(kv.dtype, torch.float32)  # a sink is in all blocks: its gradient is a long sum
    firsts = firsts.to(wide)[blocks.owner].to(kv.dtype)
    seen_keys = torch.cat([firsts, extended[blocks.keys]], 1).transpose(1, 2)  # [M,G,S+W+C,K+V]
    q = q_BTHK.flatten(0, 1)[blocks.queries].unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # [M,G,R,C,K]
    mask = _mask(blocks.first, C, sinks, near)[:, None, None].expand(-1, 1, H // G, -1, -1).flatten(2, 3)
    k, v = seen_keys.split([k_BTGK.shape[-1], v_BTGV.shape[-1]], -1)
    out = torch.nn.functional.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask, scale=scale)
    out = out.unflatten(2, (H // G, C)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)  # [M·C,H,V]
    out = out[blocks.outputs].view(B, T, H, -1)
    if back is not None:
        out = _rows(out, back)
    if not output_final_state:
        return out, None
    count = torch.full_like(seen, T) if keep_BT is None else keep_BT.sum(1)
    return out, _final_state(kv, memory, seen, count, sinks, window)


def empty_state(kv_BTGC: Tensor, slots: int) -> State:
    """The state before a sequence."""
    B, _, G, width = kv_BTGC.shape
    return kv_BTGC.new_zeros(B, G, slots, width), torch.zeros(B, dtype=torch.long, device=kv_BTGC.device)


def _dense_blocks(B: int, T: int, C: int, window: int, seen: Tensor) -> _Blocks:
    device = seen.device
    count = -(-T // C)
    row = torch.arange(B, device=device).repeat_interleave(count, output_size=B * count)
    start = (torch.arange(count, device=device) * C).repeat(B)
    places = (start[:, None] + torch.arange(C, device=device)).clamp(max=T - 1)
    keys = (start[:, None] + torch.arange(window + C, device=device)).clamp(max=window + T - 1)
    token = torch.arange(T, device=device)
    outputs = torch.arange(B, device=device)[:, None] * (count * C) + token
    return _Blocks(
        row[:, None] * T + places, row[:, None] * (window + T) + keys, seen[row] + start, row, outputs.flatten()
    )


def _packed_blocks(cu_seqlens: Tensor, C: int, window: int) -> _Blocks:
    """Of sequences in one row (a host sync, for their number)."""
    bounds = cu_seqlens.detach().cpu().long()
    length, T = bounds[1:] - bounds[:-1], int(bounds[-1])
    counts = (length + C - 1) // C
    owner = torch.arange(len(length), device="cpu").repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    first = (torch.arange(len(owner), device="cpu") - before[owner]) * C
    start = bounds[owner] + first
    queries = (start[:, None] + torch.arange(C, device="cpu")).clamp(max=T - 1)
    keys = (start[:, None] + torch.arange(window + C, device="cpu")).clamp(max=window + T - 1)
    sequence = torch.arange(len(length), device="cpu").repeat_interleave(length)
    outputs = before[sequence] * C + torch.arange(T, device="cpu") - bounds[sequence]
    return _Blocks(*(x.to(cu_seqlens.device) for x in (queries, keys, first, owner, outputs)))


def _mask(first_M: Tensor, C: int, sinks: int, window: int) -> Tensor:
    """[M,C,S+W+C], whether a query sees a key: a sink that is not after it, or another token of its window."""
    device = first_M.device
    query = first_M[:, None, None] + torch.arange(C, device=device)[:, None]
    key = first_M[:, None, None] + torch.arange(-window, C, device=device)
    near = (key >= sinks) & (key <= query) & (key > query - window)
    return torch.cat([torch.arange(sinks, device=device) <= query, near], -1)


def _in_order(memory: Tensor, seen: Tensor, sinks: int, window: int) -> Tensor:
    """[B,W,G,K+V], the last W tokens of the ring in order; what is no such token is masked."""
    number = seen[:, None] + torch.arange(-window, 0, device=seen.device)
    slot = sinks + (number - sinks) % window
    return _rows(memory.transpose(1, 2), slot)


def _first_tokens(kv: Tensor, memory: Tensor, seen: Tensor, sinks: int) -> Tensor:
    """[B,S,G,K+V], the sinks: out of the memory, or among the new tokens; what does not exist is masked."""
    number = torch.arange(sinks, device=seen.device)[None]
    new = _rows(kv, (number - seen[:, None]).clamp(0, kv.shape[1] - 1))
    old = memory[:, :, :sinks].transpose(1, 2).to(kv.dtype)
    return torch.where((number < seen[:, None])[..., None, None], old, new)


def _final_state(kv: Tensor, memory: Tensor, seen: Tensor, count: Tensor, sinks: int, window: int) -> State:
    """The state after `count` [B] more tokens; slots of tokens that came before keep what they hold."""
    after = (seen + count)[:, None]
    number = torch.arange(sinks, device=seen.device).expand(len(seen), -1)
    ring = after - 1 - (after - 1 - sinks - torch.arange(window, device=seen.device)) % window
    number = torch.cat([number, ring], 1)  # [B,S+W], the token of each slot
    valid = (number < after) & (number >= torch.cat([torch.zeros_like(number[:, :sinks]), ring * 0 + sinks], 1))
    new = _rows(kv, (number - seen[:, None]).clamp(0, kv.shape[1] - 1)).transpose(1, 2)
    came = valid & (number >= seen[:, None])
    return torch.where(came[:, None, :, None], new, memory.to(kv.dtype)), after[:, 0]


def _rows(x_BTGC: Tensor, places_BP: Tensor) -> Tensor:
    """[B,P,...]: each row's own places."""
    return x_BTGC[torch.arange(len(x_BTGC), device=x_BTGC.device)[:, None], places_BP]
