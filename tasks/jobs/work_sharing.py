"""Sharing work between ranks that judge: each does some, all know the whole."""

from __future__ import annotations

from typing import Any


def gather(value: Any, num_ranks: int) -> list[Any]:
    """What every rank gives, in the order of ranks. All ranks call it."""
    if num_ranks == 1:
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * num_ranks
    distributed.all_gather_object(gathered, value)
    return gathered
