"""The gradient of a head, block by block: gradᵀ hidden added to an fp32 sum that stays in memory. For NVIDIA's Hopper.

A block's product is as large as the head and must be added to what earlier blocks left: 5 GB a block for a head of
152,064 × 4,096, which a library's product reads and writes between its products. Here a program sends its tile
off to be added by the memory (a reduction by the copy engine, one addition an entry, so the result is the same every
time) and goes on with the next.

Dims: n tokens of a block, V vocabulary, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from radlads.kernels.linear_kl.triton_product import quarters, resident

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of the head, of its width, tokens at a time
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
    """grad [n,V], hidden [n,D], total [V,D]: descriptors of memory. BEGUN: there is something to add to."""
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
    """total (fp32) becomes gradᵀ hidden, or if it is `begun` has that added. 16-bit operands of one dtype, rows of
    multiples of 16 bytes."""
    (n, V), D = grad_nV.shape, hidden_nD.shape[1]
    programs = resident(triton.cdiv(V, ROWS) * triton.cdiv(D, COLUMNS), grad_nV)
    with torch.cuda.device_of(grad_nV):
        outer_kernel[(programs,)](
            TensorDescriptor.from_tensor(grad_nV, [DEPTH, ROWS]),
            TensorDescriptor.from_tensor(hidden_nD, [DEPTH, COLUMNS]),
            TensorDescriptor.from_tensor(total_VD, [ROWS, COLUMNS // 4]),
            n, V, D, BM=ROWS, BN=COLUMNS, BK=DEPTH, BEGUN=begun, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
