"""Windowed softmax attention with sinks, token by token: the executable specification that other forms are tested
against.

Dims: B batch, T time, H query heads, G kv heads, K key dim, V value dim per head, S sinks, W window, N sequences.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from radlads.kernels.window_attention.chunked import State, empty_state


def window_attention_reference(
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
    """As `window_attention`, a loop in fp32 (fp64 for fp64 inputs); differentiable by autograd."""
    wide = torch.float64 if v_BTGV.dtype == torch.float64 else torch.float32
    q, kv = q_BTHK.to(wide), torch.cat([k_BTGK, v_BTGV], -1).to(wide)
    keep = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if keep_BT is None else keep_BT
    if cu_seqlens is not None:
        parts = [
            _run(q[:, a:b], kv[:, a:b], keep[:, a:b], sinks, window, scale, None)[0]
            for a, b in pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, 1).to(v_BTGV.dtype), None
    out, (memory, seen) = _run(q, kv, keep, sinks, window, scale, initial_state)
    return out.to(v_BTGV.dtype), (memory.to(k_BTGK.dtype), seen) if output_final_state else None


def _run(
    q: Tensor, kv: Tensor, keep: Tensor, sinks: int, window: int, scale: float, state: State | None
) -> tuple[Tensor, State]:
    (B, T, H, K), G = q.shape, kv.shape[2]
    memory, seen = empty_state(kv, sinks + window) if state is None else (state[0].to(kv.dtype), state[1])
    slots = torch.arange(sinks + window, device=q.device)
    outs = []
    for t in range(T):
        slot = torch.where(seen < sinks, seen, sinks + (seen - sinks) % window)
        here = (slots == slot[:, None]) & keep[:, t, None]
        memory = torch.where(here[:, None, :, None], kv[:, t, :, None], memory)
        seen = seen + keep[:, t].long()
        filled = slots < seen[:, None]
        scores = torch.einsum("bgrk,bgsk->bgrs", q[:, t].unflatten(1, (G, -1)), memory[..., :K]) * scale
        weights = scores.masked_fill(~filled[:, None, None], -torch.inf).softmax(-1)
        weights = weights.masked_fill((seen == 0)[:, None, None, None], 0)  # padding before the first token
        outs.append(torch.einsum("bgrs,bgsv->bgrv", weights, memory[..., K:]).flatten(1, 2))
    return torch.stack(outs, 1) if outs else kv.new_empty(B, 0, H, kv.shape[-1] - K), (memory, seen)
