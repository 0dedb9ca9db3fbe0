"""Documents packed into the rows of a batch: their bounds in every accepted form, and the positions inside them.

Dims: B batch, T time, N documents. Needs torch only: an exported model carries this file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Positions [B,T] that restart at every bound of cu_seqlens [N+1] over the flattened [B·T]."""
    place = torch.arange(B * T, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous().long(), place, right=True)
    return (place - cu_seqlens.long()[document]).view(B, T)


def document_bounds(document_ids_BT: Tensor) -> Tensor:
    """cu_seqlens int64 [N+1] over the flattened [B·T]: wherever the id changes, and at every row."""
    return _bounds(document_ids_BT[:, 1:] != document_ids_BT[:, :-1])


def restart_bounds(position_ids_BT: Tensor) -> Tensor | None:
    """cu_seqlens int64 [N+1] from positions that do not increase by one (transformers' mark of packed rows); None if
    they always do."""
    breaks = position_ids_BT.diff(dim=-1) != 1
    return _bounds(breaks) if bool(breaks.any()) else None


def check_bounds(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """The bounds as int64. Raises ValueError unless they rise from 0 to B·T; on a GPU they are not
    checked, because reading them would synchronise."""
    bounds = cu_seqlens.flatten().long()
    if not bounds.is_cuda:
        given = bounds.tolist()
        if len(given) < 2 or given[0] != 0 or given[-1] != B * T or given != sorted(given):
            raise ValueError(f"document bounds must rise from 0 to batch times tokens = {B * T}, not {given[:8]}")
    return bounds


def _bounds(breaks_BT: Tensor) -> Tensor:
    """breaks [B,T-1]: whether a document begins at a token that is not its row's first."""
    starts = torch.nn.functional.pad(breaks_BT, (1, 0), value=True)
    end = torch.tensor([starts.numel()], device=starts.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end])
