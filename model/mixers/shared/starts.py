"""Initial values that several variants share. An exported model carries this file.

Dims: H query heads, K key dim per head, A = H·K, R low rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def rising_decay(width: int, depth: float, device: torch.device | None = None) -> Tensor:
    """w0 [A] as RWKV-7 starts it: -6.5 + 5·(n/(A-1))^(0.85 + √depth), slow channels first, fast ones last."""
    channel = torch.arange(width, dtype=torch.float32, device=device) / max(1, width - 1)
    return -6.5 + 5 * channel ** (0.85 + depth**0.5)


class HeadRamps(NamedTuple):
    """Channel ramps [A] of the starts of hxa079 and later."""

    zigzag: Tensor
    """u·|u|, with u from -1 to 1 inside each head."""
    line: Tensor
    """From -1/2 to 1/2 over all heads."""
    slow: Tensor
    """w0: -5.5 + 6·(n/(A-1))^(1 + depth^0.3) + 2.5·zigzag."""


def head_ramps(num_heads: int, head_dim: int, depth: float, device: torch.device | None = None) -> HeadRamps:
    """See `HeadRamps`. depth: 0 in the first layer, 1 in the last."""
    n = torch.arange(num_heads * head_dim, dtype=torch.float32, device=device)
    middle = max(1, head_dim - 1) / 2
    u = (n % head_dim - middle) / middle
    part = n / max(1, num_heads * head_dim - 1)
    zigzag = u * u.abs()
    return HeadRamps(zigzag, part - 0.5, -5.5 + 6 * part ** (1 + depth**0.3) + 2.5 * zigzag)


def start_gate_at_one(g2_RA: Tensor) -> None:
    """Shift every column so that it sums to two: with g1 = 0 the gate σ(x g1) g2 is half of those sums."""
    with torch.no_grad():
        g2_RA.add_((2 - g2_RA.float().sum(0)) / g2_RA.shape[0])
