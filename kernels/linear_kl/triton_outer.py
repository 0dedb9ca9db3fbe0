"""The gradient of a head for NVIDIA Hopper: adds gradᵀ hidden of each block to an fp32 sum in memory.

The product of a block is as large as the head: for a head of 152,064 × 4,096, adding it reads and writes 5 GB per
block, which a library product does between its multiplications. Here a program hands its tile to the copy engine, which
adds it in memory (one addition per entry, so the result is deterministic), and continues with the next tile.

Dims: n tokens of a block, V vocabulary, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from radlads.kernels.linear_kl.triton_product import quarters, resident

ROWS, COLUMNS, DEPTH = 128, 256, 64  # tile: head rows, head columns, tokens per step
WARPS, STAGES = 8, 4


@triton.jit
def _send(total, row, column, z, BEGUN: tl.constexpr):
    if BEGUN:
        total.atomic_add([row, column], z)
    else:
        total.store([row, column], z)


@triton.jit
def outer_kernel(
    grad, hidden, total, n, V, D, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BEGUN: tl.constexpr
):  # fmt: skip
    """grad [n,V], hidden [n,D], total [V,D]: tensor descriptors. BEGUN: add to total instead of overwriting it."""
    column_tiles = tl.cdiv(D, BN)
    Q: tl.constexpr = BN // 4
    for tile in tl.range(tl.program_id(0), tl.cdiv(V, BM) * column_tiles, tl.num_programs(0), flatten=True):
        row = tile // column_tiles * BM
        column = tile % column_tiles * BN
        z = tl.zeros([BM, BN], tl.float32)
        for k in range(0, n, BK):
            z = tl.dot(grad.load([k, row]).T, hidden.load([k, column]), z)
        a, b, c, d = quarters(z, BM, BN)
        _send(total, row, column, a, BEGUN)
        _send(total, row, column + Q, b, BEGUN)
        _send(total, row, column + 2 * Q, c, BEGUN)
        _send(total, row, column + 3 * Q, d, BEGUN)


def add_outer(total_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor, begun: bool) -> None:
    """Store gradᵀ hidden in total (fp32), or add it if `begun`. Operands: one 16-bit dtype, row lengths a multiple of
    16 bytes."""
    (n, V), D = grad_nV.shape, hidden_nD.shape[1]
    programs = resident(triton.cdiv(V, ROWS) * triton.cdiv(D, COLUMNS), grad_nV)
    with torch.cuda.device_of(grad_nV):
        outer_kernel[(programs,)](
            TensorDescriptor.from_tensor(grad_nV, [DEPTH, ROWS]),
            TensorDescriptor.from_tensor(hidden_nD, [DEPTH, COLUMNS]),
            TensorDescriptor.from_tensor(total_VD, [ROWS, COLUMNS // 4]),
            n, V, D, BM=ROWS, BN=COLUMNS, BK=DEPTH, BEGUN=begun, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
