"""The inverse of unit lower triangular tiles, which chunked delta rules need. Imports torch only: exports carry it."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_lower_inverse(L: Tensor) -> Tensor:
    """(I - L)⁻¹ for strictly lower L [G,C,C] by blocks. No powers of L: they cancel when keys repeat."""
    G, C, _ = L.shape
    if C <= 8:
        inverse = torch.eye(C, dtype=L.dtype, device=L.device).repeat(G, 1, 1)
        for row in range(1, C):
            inverse[:, row : row + 1, :row] = L[:, row : row + 1, :row] @ inverse[:, :row, :row]
        return inverse
    half = C // 2
    diagonal = unit_lower_inverse(torch.cat([L[:, :half, :half], L[:, half:, half:]]))
    inverse = torch.zeros_like(L, memory_format=torch.contiguous_format)
    inverse[:, :half, :half], inverse[:, half:, half:] = diagonal[:G], diagonal[G:]
    inverse[:, half:, :half] = diagonal[G:] @ (L[:, half:, :half] @ diagonal[:G])
    return inverse
