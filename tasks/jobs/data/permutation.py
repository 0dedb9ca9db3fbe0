"""A seeded permutation of range(n), computed for any position without the others."""

from __future__ import annotations

from typing import Any

import numpy as np

_ROUNDS = 6


def permute(places: np.ndarray[Any, Any], n: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """Map each position through the seeded permutation of range(n); int64, same shape as places.

    A Feistel network over the next even power of two, applied until the value is below n (cycle walking):
    O(len(places)) time and memory for any n. Integer arithmetic only, so the result is the same on every machine and
    with every library version.
    """
    half = max(1, (max(1, n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    salt = _mix(np.uint64(seed & (2**64 - 1))) + (np.uint64(epoch) << np.uint64(32))
    keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) + salt)
    values = np.asarray(places).astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= n
    return values.astype(np.int64)


def _mix(values: Any) -> Any:
    """The finalizer of splitmix64: each input bit changes half of the output bits on average."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
