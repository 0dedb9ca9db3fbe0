"""Launch settings and numerics of the Triton kernels, by backend and head size.

The settings are a table, not a search at run time: a search can choose different settings in each run, with different
rounding, and a resumed training run would no longer be reproducible. `benchmarks/kernels.py` measures the candidates.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from radlads.kernels.shared.backends import is_hopper
from radlads.kernels.shared.meta import FEWEST_HEADS
from radlads.kernels.shared.triton_launch import current_backend, power_of_two

FEWEST_HEADS_HOPPER = 18  # between the values measured at 16 and at 32: README.md
HOPPER_MULTIPROCESSORS = 132


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
class Wkv7Tuning:
    chunk: int
    terms_warps: int
    scan: Scan
    back: Scan
    values: Tile
    keys: Tile


@dataclass(frozen=True)
class Fused:
    """Settings of the fused kernels: a chunk of the forward pass, twice that of the backward pass; warps and stages."""

    solve_warps: int
    forward_warps: int
    forward_stages: int
    backward_warps: int
    backward_stages: int
    middles_warps: int = 0
    """0: the backward pass carries states from the beginnings of chunks to their middles; else they are kept: made by a
    kernel of their own with so many warps or, on Hopper, by the forward walk."""
    chunk: int = 32
    hopper: bool = False
    """Use the kernels of hopper_*.py, whose warps and stages follow from the head size."""
    backward_split: bool = False
    """On Hopper: two programs per head in the backward pass, if there are enough multiprocessors."""


@dataclass(frozen=True)
class Wkv7Numerics:
    """dot: operands made inside a kernel; raw: operands as loaded; store: tensors written to memory; triangle: T."""

    dot: Any
    raw: Any
    store: torch.dtype
    triangle: torch.dtype
    precision: str


def hopper_here(device: torch.device | None = None) -> bool:
    """Whether this GPU is one of NVIDIA's Hopper generation and this Triton can compile hopper_*.py for it."""
    return current_backend() == "cuda" and is_hopper(device) and _gluon()


@functools.cache
def _gluon() -> bool:
    try:
        from radlads.kernels.wkv7.hopper_backward import hopper_backward_kernel  # noqa: F401
    except ImportError:  # its language is still called experimental
        return False
    return True


def hopper_takes(K: int, V: int, log_decay: torch.dtype) -> bool:
    """Whether the kernels for Hopper take these sizes: tiles of 64 or 128 rows, sixteen bytes a copy."""
    same = power_of_two(K) == power_of_two(V)
    return same and 32 < K <= 128 and K % 8 == V % 8 == 0 and log_decay.itemsize == 2


def fused_tuning(
    K: int, V: int, heads: int, dtype: torch.dtype, backend: str, *, hopper: bool | None = None
) -> Fused | None:
    """Settings of the fused kernels; None where the kernels with chunks in parallel are better, or the only ones that
    fit.

    One program walks over each of the `heads` (of all sequences): too few of them leave a GPU idle. `hopper`: whether
    the kernels for Hopper can be used; None checks it, for a log decay of 16 bits.
    """
    wide = max(K, V)
    if wide > 128 or dtype not in (torch.bfloat16, torch.float16):
        return None
    if backend == "interpreter":
        return Fused(1, 4, 1, 4, 1)
    if hopper is None:
        hopper = backend == "cuda" and hopper_takes(K, V, dtype) and hopper_here()
    if hopper and heads >= FEWEST_HEADS_HOPPER:
        split = 2 * heads <= HOPPER_MULTIPROCESSORS
        if wide > 64:
            return Fused(2, 8, 1, 8, 1, 4, hopper=True, backward_split=split)
        return Fused(1, 4, 1, 4, 1, hopper=True, backward_split=split)
    if heads < FEWEST_HEADS or (backend == "hip" and wide > 64):
        return None
    if wide > 64:
        return Fused(2, 8, 1, 8, 2, 4)
    return Fused(1, 4, 1, 4, 2 if backend == "cuda" else 1)


@dataclass(frozen=True)
class Call:
    """Properties of a call that determine its kernels; heads: of all sequences together."""

    K: int
    V: int
    heads: int
    dtype: torch.dtype
    log_decay: torch.dtype
    backend: str


def name_form(tuning: Fused | None) -> str:
    """Readable name of the form of wkv7 with these settings; None: the kernels with chunks in parallel."""
    if tuning is None:
        return "triton, chunks in parallel"
    return "triton, fused for Hopper" if tuning.hopper else "triton, fused"


def why_slower(tuning: Fused | None, call: Call, device: torch.device | None) -> str:
    """Why `fused_tuning` gave no faster kernels for this call, in one line; empty where there are none."""
    hopper = call.backend == "cuda" and is_hopper(device)
    if (tuning is not None and tuning.hopper) or call.backend == "interpreter" or (tuning is not None and not hopper):
        return ""
    sizes = f"K={call.K}, V={call.V}"
    if hopper and not _gluon():
        return "this Triton has no Gluon"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"the inputs are {str(call.dtype).removeprefix('torch.')}, the fused kernels take 16 bits"
    if hopper and call.log_decay.itemsize != 2:
        return (
            f"the log decay is {str(call.log_decay).removeprefix('torch.')}, the fused kernels for Hopper take 16 bits"
        )
    if max(call.K, call.V) > 128 or (hopper and not hopper_takes(call.K, call.V, call.log_decay)):
        return f"the fused kernels do not take {sizes}"
    least = FEWEST_HEADS_HOPPER if hopper else FEWEST_HEADS
    return f"{call.heads} heads in all sequences would leave the GPU idle, the fused kernels are faster from {least}"


def fused_candidates(K: int, V: int, backend: str) -> list[Fused]:
    """Settings of the fused kernels worth measuring, the default first."""
    default = fused_tuning(K, V, FEWEST_HEADS, torch.bfloat16, backend)
    if default is None or backend == "interpreter":
        return []
    portable = fused_tuning(K, V, FEWEST_HEADS, torch.bfloat16, backend, hopper=False)
    settings = [(2, 4, 2, 4, 2), (1, 8, 1, 8, 2)] if max(K, V) <= 64 else [(1, 4, 1, 4, 1)]
    return list(dict.fromkeys([default, portable, *(Fused(*setting) for setting in settings)]))


def default_tuning(K: int, V: int, backend: str) -> Wkv7Tuning:
    """The settings in use for these head sizes."""
    wide = max(K, V)
    if wide < 64 or backend == "interpreter":
        size = max(16, min(64, power_of_two(wide)))
        return Wkv7Tuning(32, 4, Scan(size, 4, 1), Scan(size, 4, 1), Tile(size, size, 4), Tile(size, size, 4))
    if wide > 128:
        return Wkv7Tuning(16, 8, Scan(16, 8, 1), Scan(16, 8, 1), Tile(32, 32, 4), Tile(32, 32, 4))
    if wide > 64 and backend == "hip":
        return Wkv7Tuning(32, 8, Scan(32, 8, 1), Scan(32, 8, 1), Tile(32, 64, 8), Tile(32, 64, 8))
    if wide > 64:
        return Wkv7Tuning(32, 8, Scan(32, 4, 2), Scan(32, 4, 2), Tile(64, 64, 4), Tile(64, 64, 8))
    return Wkv7Tuning(32, 4, Scan(32, 4, 2), Scan(32, 4, 2), Tile(64, 64, 4), Tile(64, 64, 4))


def candidates(K: int, V: int, backend: str) -> list[Wkv7Tuning]:
    """Settings worth measuring, the default first. The i-th of them tries the i-th setting of every kernel."""
    default = default_tuning(K, V, backend)
    if not 64 <= max(K, V) <= 128 or backend == "interpreter":
        return [default]
    warps = (4, 8, 2 if max(K, V) == 64 else 8, 4, 8, 4)
    scans = (Scan(32, 4, 2), Scan(64, 4, 2), Scan(16, 4, 2), Scan(32, 4, 3), Scan(32, 2, 2), Scan(64, 8, 2))
    tiles = (Tile(64, 64, 8), Tile(64, 64, 4), Tile(32, 32, 4), Tile(32, 32, 8), Tile(64, 32, 8), Tile(32, 64, 8))
    rows = zip(warps, scans, tiles, strict=True)
    found = [Wkv7Tuning(chunk, w, scan, scan, tile, tile) for w, scan, tile in rows for chunk in (32, 64)]
    return list(dict.fromkeys([default, *found]))


def choose_numerics(dtype: torch.dtype, backend: str, *, wide: bool = False) -> Wkv7Numerics:
    """Values computed from bf16 keep ten bits in products (tf32), and are stored in memory as fp32 where that fits.

    Stored as bf16, one key that repeats through a document gave errors of 0.99e-2 in the gradient of a; stored as fp32,
    0.77e-2. Products in three passes (tf32x3) give 0.69e-2, at ten times the time. wide: heads over 128 channels;
    their tiles, and AMD's, fit the shared memory as bf16 alone (1.07e-2 at 256 channels).
    """
    if backend == "interpreter":
        store = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return Wkv7Numerics(tl.float32, tl.float32, store, torch.float32, "ieee")
    if dtype == torch.bfloat16:
        if wide or backend == "hip":
            raw, store = tl.bfloat16, torch.bfloat16
        else:
            raw, store = tl.float32, torch.float32
        return Wkv7Numerics(tl.float32, raw, store, torch.float16, "tf32" if backend == "cuda" else "ieee")
    precision = "ieee" if backend == "hip" else "tf32" if dtype == torch.float16 else "tf32x3"
    return Wkv7Numerics(tl.float32, tl.float32, torch.float32, torch.float32, precision)
