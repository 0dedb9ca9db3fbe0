"""Windowed attention on the meta device: shapes, and the tensors that a call keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radlads.kernels.shared.meta import KeptForBackward
from radlads.kernels.window_attention.chunked import State, empty_state


def window_attention_meta(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, sinks: int, window: int, **options: Any
) -> tuple[Tensor, State | None]:
    """As `window_attention`. Keeps what fused attention keeps of each block: its keys and values (k and v stand for one
    copy of each token's), queries, output, a number a query, and the mask as it is added to scores."""
    (B, T, H, _), G, V = q_BTHK.shape, k_BTGK.shape[2], v_BTGV.shape[-1]
    C = min(window, T)
    blocks, seen = B * -(-T // C), sinks + 2 * C  # without tokens from before, a block sees as many as it has
    kept = [v_BTGV.new_empty(blocks * seen - B * T, G, k_BTGK.shape[-1] + V)]
    kept += [v_BTGV.new_empty(blocks, H // G * C, seen), q_BTHK.new_empty(B, T, H, dtype=torch.float32)]
    like = v_BTGV.new_empty(B, T, H, V)
    out = KeptForBackward.apply(kept, like, q_BTHK, k_BTGK, v_BTGV)
    if not options.get("output_final_state"):
        return out, None
    return out, empty_state(torch.cat([k_BTGK, v_BTGV], -1), sinks + window)
