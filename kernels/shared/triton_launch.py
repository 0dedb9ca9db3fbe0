"""What every launch of the wkv7 kernels knows about its call: sizes, sequences and their chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a tensor of it. A slot is one chunk of one sequence."""

    T: int
    H: int
    K: int
    V: int
    chunk: int
    num_sequences: int
    num_chunks: int
    num_slots: int
    packed: tuple[Tensor, Tensor] | None
    tail: bool

    @property
    def where(self) -> tuple[Any, ...]:
        return self.packed or (None, None)

    def tiles(self, size: int, tile: int) -> tuple[int]:
        return (self.num_slots * self.H * triton.cdiv(size, tile),)


def make_plan(k_BTHK: Tensor, v_BTHV: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Plan:
    """The plan of a call with chunks of this length. Nothing waits for the host: packed slots are an upper bound."""
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    if cu_seqlens is None:
        count = triton.cdiv(T, chunk)
        return Plan(T, H, K, V, chunk, B, count, B * count, None, T % chunk != 0)
    bounds = cu_seqlens.to(device=v_BTHV.device, dtype=torch.int64)
    chunks = (bounds.diff() + (chunk - 1)) // chunk
    offsets = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    n = bounds.numel() - 1
    return Plan(T, H, K, V, chunk, n, 0, (T + n * (chunk - 1)) // chunk, (bounds, offsets), True)


def power(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16: what a tile of a product must have."""
    return max(16, triton.next_power_of_2(size))
