"""Data of every launch of a recurrence's Triton kernels: the backend, sizes, sequences and their chunks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

MOST_CHANNELS = 256


@dataclass(frozen=True)
class ChunkPlan:
    """All properties of a call except its tensors. A slot is one chunk of one sequence."""

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
        return (self.num_slots * self.H * cdiv(size, tile),)


def plan_chunks(k_BTHK: Tensor, v_BTHV: Tensor, cu_seqlens: Tensor | None, chunk: int) -> ChunkPlan:
    """The plan of a call with chunks of this length. Nothing waits for the host: packed slots are an upper bound."""
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    if cu_seqlens is None:
        count = cdiv(T, chunk)
        return ChunkPlan(T, H, K, V, chunk, B, count, B * count, None, T % chunk != 0)
    bounds = cu_seqlens.to(device=v_BTHV.device, dtype=torch.int64)
    chunks = (bounds.diff() + (chunk - 1)) // chunk
    offsets = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    n = bounds.numel() - 1
    return ChunkPlan(T, H, K, V, chunk, n, 0, (T + n * (chunk - 1)) // chunk, (bounds, offsets), True)


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`. Triton's own costs the host ten times as long, some twenty times a layer."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << (size - 1).bit_length() if size > 1 else 1


def power(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16: what a tile of a product must have."""
    return max(16, power_of_two(size))


def current_backend() -> str:
    """ "interpreter", "cuda" or "hip"."""
    if not torch.compiler.is_compiling() and _interprets():
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


@cache
def _interprets() -> bool:
    # Decided when a kernel is defined, so once; the knob reads the environment at every look.
    return bool(triton.knobs.runtime.interpret)


def why_not_in_triton(v: Tensor, K: int, backend: str) -> str | None:
    """Why no Triton kernel of a recurrence can take these tensors, in one line; None if one can."""
    if backend != "interpreter" and not v.is_cuda:
        return f"the tensors are on {v.device}, not on a GPU"
    if v.dtype == torch.float64:
        return "float64 is not supported"
    if max(K, v.shape[-1]) > MOST_CHANNELS:
        return f"head sizes above {MOST_CHANNELS} are not supported, got K={K}, V={v.shape[-1]}"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Launches inside go to the GPU that holds `x`, whatever the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
