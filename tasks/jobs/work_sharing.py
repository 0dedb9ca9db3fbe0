"""Sharing evaluation work between ranks: each computes a part, all get the whole result."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def gather(value: Any, num_ranks: int) -> list[Any]:
    """Every rank's value, in the order of ranks. All ranks call it."""
    if num_ranks == 1:
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * num_ranks
    distributed.all_gather_object(gathered, value)
    return gathered


def same_draw(device: torch.device) -> str:
    """Eight random hexadecimal digits, drawn by the first rank. All ranks call it."""
    import torch
    from torch import distributed

    drawn = torch.tensor([secrets.randbits(32)], device=device)
    distributed.broadcast(drawn, src=0)
    return f"{int(drawn.item()):08x}"
