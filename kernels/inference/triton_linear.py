"""Few rows by the weights of several linear layers in one launch.

Bound by reading weights once. A program reads BO rows of one matrix over their whole width; one row of inputs is a
product by elements and a sum, more rows are a product of tiles. Sums are fp32, in an order that shapes alone determine.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from radlads.kernels.inference.reference import MOST_TOGETHER
from radlads.kernels.shared.triton_launch import cdiv, current_backend, on_device_of, power_of_two


@triton.jit
def _product(x, w, row, inside, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):
    """x [N,D] by the rows `row` [BO] of w: fp32 [BN,BO]."""
    n = tl.arange(0, BN)
    total = tl.zeros([BN, BO], dtype=tl.float32)
    partial = tl.zeros([BO, BK], dtype=tl.float32)
    for start in range(0, D, BK):
        c = start + tl.arange(0, BK)
        known = c < D
        tile = tl.load(w + row[:, None] * D + c[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        if N == 1:
            partial += tile.to(tl.float32) * tl.load(x + c, mask=known, other=0.0).to(tl.float32)[None, :]
        else:
            rows = tl.load(x + n[:, None] * D + c[None, :], mask=(n < N)[:, None] & known[None, :], other=0.0)
            total = tl.dot(rows, tl.trans(tile), total)
    if N == 1:
        total += tl.sum(partial, 1)[None, :]
    return total


@triton.jit
def store_rows(out, value, row, inside, O, N: tl.constexpr, BN: tl.constexpr):  # noqa: E741 -- the width out
    n = tl.arange(0, BN)
    tl.store(out + n[:, None] * O + row[None, :], value.to(out.dtype.element_ty), mask=(n < N)[:, None] & inside[None])


@triton.jit
def pick(tile, T0, T1, T2, T3, a, b, c, d, e):
    """Of five numbers that of the matrix to which a tile belongs."""
    return tl.where(tile >= T3, e, tl.where(tile >= T2, d, tl.where(tile >= T1, c, tl.where(tile >= T0, b, a))))


@triton.jit
def pick_pointer(tile, T0, T1, T2, T3, a, b, c, d, e):
    """Likewise of pointers, for which there is no `where`."""
    found = a
    if tile >= T3:
        found = e
    elif tile >= T2:
        found = d
    elif tile >= T1:
        found = c
    elif tile >= T0:
        found = b
    return found


@triton.jit
def linear_kernel(
    x0, x1, x2, x3, x4, w0, w1, w2, w3, w4, b0, b1, b2, b3, b4, y0, y1, y2, y3, y4,
    O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, O3: tl.constexpr, O4: tl.constexpr, BIAS: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BO outputs, of one matrix after the other. BIAS: bit i says whether matrix i has one."""
    tile = tl.program_id(0)
    T0: tl.constexpr = (O0 + BO - 1) // BO
    T1: tl.constexpr = T0 + (O1 + BO - 1) // BO
    T2: tl.constexpr = T1 + (O2 + BO - 1) // BO
    T3: tl.constexpr = T2 + (O3 + BO - 1) // BO
    x, w = (
        pick_pointer(tile, T0, T1, T2, T3, x0, x1, x2, x3, x4),
        pick_pointer(tile, T0, T1, T2, T3, w0, w1, w2, w3, w4),
    )
    b, y = (
        pick_pointer(tile, T0, T1, T2, T3, b0, b1, b2, b3, b4),
        pick_pointer(tile, T0, T1, T2, T3, y0, y1, y2, y3, y4),
    )
    O = pick(tile, T0, T1, T2, T3, O0, O1, O2, O3, O4)  # noqa: E741
    first = pick(tile, T0, T1, T2, T3, 0, T0, T1, T2, T3)
    bias = (BIAS >> pick(tile, T0, T1, T2, T3, 0, 1, 2, 3, 4)) & 1
    row = (tile - first) * BO + tl.arange(0, BO)
    inside = row < O
    value = _product(x, w, row, inside, D, N, BN, BO, BK)
    if BIAS > 0:
        value += tl.load(b + row, mask=inside & (bias > 0), other=0.0).to(tl.float32)[None, :]
    store_rows(y, value, row, inside, O, N, BN)


@triton.jit
def gated_kernel(
    x, gate, up, y, O: tl.constexpr,  # noqa: E741
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BO outputs. Both products are rounded, as they are where they are written to memory."""
    row = tl.program_id(0) * BO + tl.arange(0, BO)
    inside = row < O
    g = _product(x, gate, row, inside, D, N, BN, BO, BK).to(y.dtype.element_ty).to(tl.float32)
    u = _product(x, up, row, inside, D, N, BN, BO, BK).to(y.dtype.element_ty).to(tl.float32)
    g = (g * tl.sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    store_rows(y, g * u, row, inside, O, N, BN)


def tiles_of(N: int, D: int, *, gated: bool = False) -> dict[str, int]:
    """Sizes of a launch for N rows of width D: outputs a program, columns a step, and rows in a tile of a product. The
    fastest of some forty on an H200, at widths of 576 to 6,144 (benchmarks/inference_tiles.py)."""
    power = max(16, power_of_two(D))
    if N == 1:
        BO = 4 if D <= 1024 else 2 if gated or D > 4096 else 1
        BK = min(power, 2048 if gated or D > 4096 else 1024)
        return {"N": 1, "BN": 1, "BO": BO, "BK": BK, "num_warps": 4, "num_stages": 3}
    if current_backend() == "hip":  # whose shared memory holds less
        return {"N": N, "BN": 16, "BO": 16, "BK": min(128, power), "num_warps": 4, "num_stages": 2}
    return {"N": N, "BN": 16, "BO": 16, "BK": min(256 if gated else 512, power), "num_warps": 2, "num_stages": 3}


def linear_together_triton(
    xs_BTD: Sequence[Tensor], weights_OD: Sequence[Tensor], biases_O: Sequence[Tensor | None]
) -> list[Tensor]:
    """As `linear_together`, for checked shapes on a GPU (or in Triton's interpreter)."""
    D, lead = xs_BTD[0].shape[-1], xs_BTD[0].shape[:-1]
    xs = [x.contiguous() for x in xs_BTD]
    outs = [x.new_empty(*lead, w.shape[0]) for x, w in zip(xs, weights_OD, strict=True)]
    widths = [w.shape[0] for w in weights_OD]
    meta = tiles_of(lead.numel(), D)
    bits = sum((bias is not None) << place for place, bias in enumerate(biases_O))
    biases = [x if bias is None else bias.contiguous() for x, bias in zip(xs, biases_O, strict=True)]
    lists = (filled(xs), filled(weights_OD), filled(biases), filled(outs))
    sizes = [*widths, *[0] * (MOST_TOGETHER - len(widths))]
    grid = (sum(cdiv(width, meta["BO"]) for width in widths),)
    with on_device_of(xs[0]):
        linear_kernel[grid](*(x for one in lists for x in one), *sizes, bits, D, **meta)
    return outs


def gated_linear_triton(x_BTD: Tensor, gate_OD: Tensor, up_OD: Tensor) -> Tensor:
    """As `gated_linear`, for checked shapes on a GPU (or in Triton's interpreter)."""
    x = x_BTD.contiguous()
    width, D = gate_OD.shape
    out = x.new_empty(*x.shape[:-1], width)
    meta = tiles_of(x.shape[:-1].numel(), D, gated=True)
    with on_device_of(x):
        gated_kernel[(cdiv(width, meta["BO"]),)](x, gate_OD, up_OD, out, width, D, **meta)
    return out


def filled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as the kernel has arguments; the last ones are not read."""
    return [*tensors, *[tensors[-1]] * (MOST_TOGETHER - len(tensors))]
