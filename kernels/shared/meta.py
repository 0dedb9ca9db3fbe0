"""The recurrences on the meta device: shapes, and the tensors that a kernel keeps for its backward pass.

A plan runs a layer on the meta device and sums the bytes that autograd keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_CHUNK = 32


def wkv7_meta(
    r_BTHK: Tensor, log_decay: Tensor, k: Tensor, v_BTHV: Tensor, a: Tensor, b: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """As `wkv7`. Keeps the tensors of the Triton kernels with chunks in parallel: inputs, reads, per chunk L, state,
    inverse.

    The fused kernels, used except for few heads, keep the same within 3 % for heads over 64 (two states a chunk, U),
    and less below. For few heads in 16 bits on NVIDIA, L, states and reads are fp32: twice the bytes counted here.
    """
    B, T, H, K = r_BTHK.shape
    V, tiles = v_BTHV.shape[-1], B * -(-T // _CHUNK) * H
    sizes = ((tiles, K, K), (tiles, K, V), (tiles, _CHUNK, _CHUNK), r_BTHK.shape)
    kept = [v_BTHV.new_empty(size) for size in sizes]
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
