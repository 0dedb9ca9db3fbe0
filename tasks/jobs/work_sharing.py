"""Sharing evaluation work between ranks: each computes a part, all get the whole result."""

from __future__ import annotations

from typing import Any


def gather(value: Any, num_ranks: int) -> list[Any]:
    """Every rank's value, in the order of ranks. All ranks call it."""
    if num_ranks == 1:
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * num_ranks
    distributed.all_gather_object(gathered, value)
    return gathered
