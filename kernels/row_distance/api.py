"""`squared_distance`: Σ_D (S − T)² of every row, in one pass over memory forward and one backward."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from radlads.kernels.shared.backends import not_on_gpu, triton_installed
from radlads.kernels.shared.chosen import note_kernel


def squared_distance(
    out_BTD: Tensor, wanted_BTD: Tensor, *, backend: Literal["torch", "triton"] | None = None
) -> Tensor:
    """Σ over D of (out − wanted)², [B,T], in fp32, or in fp64 for such tensors. `wanted` is a constant.

    Differences and sums are fp32 whatever the tensors' dtype, and the gradient is rounded once. backend: None picks
    Triton on a GPU where it applies, else torch. Raises ValueError, in one line, for shapes that differ and for a
    backend that cannot run.
    """
    if out_BTD.shape != wanted_BTD.shape or out_BTD.dim() != 3:
        shapes = f"{tuple(out_BTD.shape)} and {tuple(wanted_BTD.shape)}"
        raise ValueError(f"squared_distance: two tensors [B,T,D] of one shape are needed, got {shapes}")
    reason = "requested" if backend == "torch" else _why_not_fused(out_BTD, wanted_BTD)
    if backend == "triton" and reason is not None:
        raise ValueError(f"squared_distance: backend 'triton' cannot run here: {reason}")
    note_kernel("squared_distance", "triton" if reason is None else "plain torch", lambda: reason or "")
    if reason is None:
        from radlads.kernels.row_distance.triton_distance import squared_distance_triton

        return squared_distance_triton(out_BTD, wanted_BTD.detach())
    return squared_distance_torch(out_BTD, wanted_BTD)


def squared_distance_torch(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """See `squared_distance`."""
    wide = torch.promote_types(out_BTD.dtype, torch.float32)
    return (out_BTD.to(wide) - wanted_BTD.detach().to(wide)).square().sum(-1)


def _why_not_fused(out: Tensor, wanted: Tensor) -> str | None:
    if out.is_meta or not triton_installed():
        return "triton is not installed" if out.is_cuda else not_on_gpu(out)
    from radlads.kernels.shared.triton_launch import current_backend, why_not_in_triton

    if reason := why_not_in_triton(out[..., :1], 1, current_backend()):  # a row may have any width
        return reason
    return None if out.dtype == wanted.dtype else f"the tensors differ in dtype: {out.dtype}, {wanted.dtype}"
