"""Launch settings and numerics of the Triton kernels, by backend and head size.

The settings are a table, not a search at run time: a search picks other settings from run to run, and with them other
roundings, and a resumed training run would no longer repeat. `benchmarks/kernels.py` measures the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Scan:
    """Settings of a kernel that walks over the chunks with BV columns of the state."""

    values: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tile:
    """Settings of a gradient kernel: keys and values per tile."""

    keys: int
    values: int
    warps: int


@dataclass(frozen=True)
class Tuning:
    chunk: int
    terms_warps: int
    scan: Scan
    back: Scan
    values: Tile
    keys: Tile


@dataclass(frozen=True)
class Numerics:
    """dot: operands made inside a kernel; raw: operands as loaded; store: what goes through memory; triangle: T."""

    dot: Any
    raw: Any
    store: torch.dtype
    triangle: torch.dtype
    precision: str


def _small(K: int, V: int) -> Tuning:
    size = max(16, min(64, triton.next_power_of_2(max(K, V))))
    tile = Tile(size, size, 4)
    return Tuning(32, 4, Scan(size, 4, 1), Scan(size, 4, 1), tile, tile)


def candidates(K: int, V: int, backend: str) -> list[Tuning]:
    """Settings worth measuring for these head sizes, the default first."""
    wide = max(K, V)
    if wide < 64 or backend == "interpreter":
        return [_small(K, V)]
    if wide > 128:
        tile = Tile(32, 32, 4)
        return [Tuning(16, 8, Scan(32, 8, 1), Scan(32, 8, 1), tile, tile)]
    warps = 4 if wide == 64 or backend == "hip" else 8
    tile = Tile(32 if wide == 96 else 64, 32 if wide == 96 else 64, warps)
    narrow = Tile(32, 32, 4)
    scan = Scan(32, 4, 2)
    found = [Tuning(32, warps, scan, scan, tile, tile)]
    for chunk in (32, 64):
        for terms_warps in (2, 4, 8):
            for one in (tile, narrow, Tile(tile.keys, tile.values, 8)):
                scan = Scan(32 if terms_warps == 4 else 64 if terms_warps == 8 else 16, 4, {2: 1, 4: 2, 8: 3}[terms_warps])
                found.append(Tuning(chunk, terms_warps, scan, scan, one, one))
    return list(dict.fromkeys(found))


def default_tuning(K: int, V: int, backend: str) -> Tuning:
    return candidates(K, V, backend)[0]


def choose_numerics(dtype: torch.dtype, backend: str) -> Numerics:
    """bf16 goes through memory as bf16 and is multiplied as loaded; what a kernel makes of it keeps ten bits of mantissa."""
    if backend == "interpreter":
        store = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return Numerics(tl.float32, tl.float32, store, torch.float32, "ieee")
    if dtype == torch.bfloat16:
        return Numerics(tl.float32, tl.bfloat16, torch.bfloat16, torch.float16, "tf32" if backend == "cuda" else "ieee")
    precision = "ieee" if backend == "hip" else "tf32" if dtype == torch.float16 else "tf32x3"
    return Numerics(tl.float32, tl.float32, torch.float32, torch.float32, precision)


def current_backend() -> str:
    """"interpreter", "cuda" or "hip"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"
