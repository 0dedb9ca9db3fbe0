"""The gated delta rule on the meta device: shapes, and the tensors that a call keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radlads.kernels.gated_delta.chunked import CHUNK
from radlads.kernels.shared.backends import installed
from radlads.kernels.shared.meta import KeptForBackward, finish_meta


def gated_delta_meta(
    q_BTHK: Tensor, k: Tensor, v_BTHV: Tensor, log_decay: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """As `gated_delta`. Keeps the same tensors as the form that this installation uses on a GPU.

    fla: inputs, cumulative decays in fp32 and the inverse of every chunk. chunked: inputs, the fp32 state before every
    chunk and the fp32 U of every token.
    """
    B, T, H, K = q_BTHK.shape
    tiles, V = B * -(-T // CHUNK) * H, v_BTHV.shape[-1]
    if installed("fla"):
        kept = [k.new_empty(tiles, CHUNK, CHUNK), k.new_empty(B, T, H, dtype=torch.float32)]
    else:
        kept = [v_BTHV.new_empty(tiles, size, V, dtype=torch.float32) for size in (K, CHUNK)]
    return finish_meta(KeptForBackward.apply(kept, v_BTHV, q_BTHK, k, log_decay, beta), K, options)
