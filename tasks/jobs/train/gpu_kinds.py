"""What the kinds of GPU can do, from their vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuKind:
    """One GPU (of an MI250, one of its two dies)."""

    peak_flops: float
    """Dense bf16 with fp32 sums, FLOP/s."""
    bandwidth: float
    """Of its memory, bytes/s."""
    link: float
    """Bytes/s that one of eight GPUs sends in a reduction over all: about two thirds of the data sheet's number."""
    gibibytes: int
    """Memory, in GB by its data sheet."""
    nvidia: bool = True


GPU_KINDS = {
    "H100": GpuKind(989e12, 3.35e12, 300e9, 80),
    "H200": GpuKind(989e12, 4.8e12, 300e9, 141),
    "B200": GpuKind(2250e12, 8.0e12, 600e9, 180),
    "A100": GpuKind(312e12, 2.0e12, 200e9, 80),
    "MI300X": GpuKind(1307e12, 5.3e12, 300e9, 192, nvidia=False),
    "MI325X": GpuKind(1307e12, 6.0e12, 300e9, 256, nvidia=False),
    "MI250": GpuKind(191e12, 1.6e12, 100e9, 64, nvidia=False),
    "L40S": GpuKind(362e12, 0.86e12, 20e9, 48),
    "RTX 4090": GpuKind(165e12, 1.0e12, 20e9, 24),
    "RTX 3090": GpuKind(71e12, 0.94e12, 20e9, 24),
}
"""By a part of the device's reported name."""


def find_kind(name: str) -> str | None:
    """The kind of a GPU that torch or nvidia-smi calls `name`; None: unknown."""
    return next((kind for kind in GPU_KINDS if kind in name), None)
