"""The recurrences on the meta device: shapes, and the tensors that a kernel keeps for its backward pass.

A plan runs a layer on the meta device and sums the bytes that autograd keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_CHUNK = 32
FEWEST_HEADS = 96
"""Of wkv7, of all sequences together: fewer leave too much of a GPU idle with one program per head."""


def wkv7_meta(
    r_BTHK: Tensor, log_decay: Tensor, k: Tensor, v_BTHV: Tensor, a: Tensor, b: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """As `wkv7`. Keeps the tensors of the Triton kernels: inputs, and what the fused ones store of a chunk (two
    triangles, one state or, for heads over 64, two, and U), or, for few heads, those with chunks in parallel (L, a
    state, a triangle, and the reads).

    For few heads of up to 128 channels on NVIDIA, L, states and reads are fp32, as counted here.
    """
    B, T, H, K = r_BTHK.shape
    V, tiles, wide = v_BTHV.shape[-1], B * -(-T // _CHUNK) * H, max(K, v_BTHV.shape[-1])
    if v_BTHV.element_size() == 2 and wide <= 128 and B * H >= FEWEST_HEADS:
        sizes = ((tiles, _CHUNK, _CHUNK * 3 // 2), (tiles, 2 if wide > 64 else 1, K, V), v_BTHV.shape)
        kept = [v_BTHV.new_empty(size) for size in sizes]
    else:
        stored = v_BTHV.dtype if wide > 128 else torch.float32
        kept = [v_BTHV.new_empty(size, dtype=stored) for size in ((tiles, K, K), (tiles, K, V), r_BTHK.shape)]
        kept.append(v_BTHV.new_empty(tiles, _CHUNK, _CHUNK))
    return finish_meta(KeptForBackward.apply(kept, v_BTHV, r_BTHK, log_decay, k, a, b), K, options)


def wkv6_meta(r_BTHK: Tensor, log_decay: Tensor, k: Tensor, v_BTHV: Tensor, **options: Any) -> Any:
    """As `wkv6`. Keeps the tensors of the chunked form: inputs, and the fp32 state before every chunk."""
    B, T, H, K = r_BTHK.shape
    states = v_BTHV.new_empty(B * -(-T // _CHUNK) * H, K, v_BTHV.shape[-1], dtype=torch.float32)
    return finish_meta(KeptForBackward.apply([states], v_BTHV, r_BTHK, log_decay, k), K, options)


class KeptForBackward(torch.autograd.Function):
    """An output like v, and a node of the graph that keeps `kept`, v and the inputs."""

    @staticmethod
    def forward(ctx: FunctionCtx, kept: list[Tensor], v: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*kept, v, *inputs)
        return torch.empty_like(v)


def finish_meta(out_BTHV: Tensor, K: int, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The output and, if set in `options`, a final state [B,H,K,V]."""
    if not options.get("output_final_state"):
        return out_BTHV, None
    B, _, H, V = out_BTHV.shape
    return out_BTHV, out_BTHV.new_empty(B, H, K, V, dtype=torch.float32)
