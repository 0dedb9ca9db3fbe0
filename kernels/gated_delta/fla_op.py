"""The gated delta rule by the Triton kernels of flash-linear-attention (package fla-core), if installed.

fla is imported only in the call. Its kernels choose their launch settings by timing them in the first calls.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from radlads.kernels.shared.backends import is_hopper, not_on_gpu
from radlads.kernels.shared.chosen import note_kernel

# As in chunked.py.
_MIN_LOG_DECAY = -1e4
_WIDEST = 256
# fla refuses these releases of triton on Hopper (fla.ops.common.chunk_o, fla issue 640): from, up to but without.
_WRONG_TRITON = ((3, 4, 0), (3, 7, 1))


def why_not_applicable(v: Tensor, K: int, dtype: torch.dtype) -> str | None:
    """One line on why these tensors cannot go through fla's kernels; None if they can. dtype: of q, k and v."""
    if not v.is_cuda:
        return not_on_gpu(v)
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the inputs are {str(dtype).removeprefix('torch.')}, which fla would multiply in tf32; it takes 16 bits"
    if max(K, v.shape[-1]) > _WIDEST:
        return f"fla's kernels take heads up to {_WIDEST}, not K={K}, V={v.shape[-1]}"
    if is_hopper(v.device) and _WRONG_TRITON[0] <= _triton_release() < _WRONG_TRITON[1]:
        return (
            f"triton {version('triton')} computes fla's backward pass wrongly on Hopper; install triton 3.7.1 or newer"
        )
    return None


@cache
def _triton_release() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version("triton"))[:3])


def gated_delta_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `gated_delta`, through `fla.ops.gated_delta_rule.chunk_gated_delta_rule` (0.6)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    note_kernel("gated_delta", f"fla-core {version('fla-core')}")
    return chunk_gated_delta_rule(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        g=log_decay_BTH.float().clamp(min=_MIN_LOG_DECAY),
        beta=beta_BTH,
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )
