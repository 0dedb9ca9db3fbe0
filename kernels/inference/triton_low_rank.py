"""Several low-rank maps of few rows in two launches: sums over parts of the width, then activation and second factor.

A first factor is narrow, so a program reads BR of its columns over a part of the width; the second launch adds those
parts up, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from radlads.kernels.inference.reference import MOST_TOGETHER, Activation
from radlads.kernels.inference.triton_linear import filled, pick, pick_pointer, store_rows
from radlads.kernels.shared.triton_launch import cdiv, on_device_of, power_of_two

_CODES = {None: 0, "tanh": 1, "sigmoid": 2}
_PART = 256  # of the width, a program


@triton.jit
def first_kernel(
    x0, x1, x2, x3, x4, w0, w1, w2, w3, w4, low,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, R4: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """low [parts,N,sum of ranks] fp32. Grid: (tiles of BR columns, of one factor after the other; parts of BK rows)."""
    tile, part = tl.program_id(0), tl.program_id(1)
    T0: tl.constexpr = (R0 + BR - 1) // BR
    T1: tl.constexpr = T0 + (R1 + BR - 1) // BR
    T2: tl.constexpr = T1 + (R2 + BR - 1) // BR
    T3: tl.constexpr = T2 + (R3 + BR - 1) // BR
    x, w = (
        pick_pointer(tile, T0, T1, T2, T3, x0, x1, x2, x3, x4),
        pick_pointer(tile, T0, T1, T2, T3, w0, w1, w2, w3, w4),
    )
    R = pick(tile, T0, T1, T2, T3, R0, R1, R2, R3, R4)
    first = pick(tile, T0, T1, T2, T3, 0, T0, T1, T2, T3)
    place = pick(tile, T0, T1, T2, T3, 0, R0, R0 + R1, R0 + R1 + R2, R0 + R1 + R2 + R3)
    column = (tile - first) * BR + tl.arange(0, BR)
    inside = column < R
    c, n = part * BK + tl.arange(0, BK), tl.arange(0, BN)
    factor = tl.load(w + c[:, None] * R + column[None, :], mask=(c < D)[:, None] & inside[None, :], other=0.0)
    if N == 1:
        row = tl.load(x + c, mask=c < D, other=0.0).to(tl.float32)
        value = tl.sum(factor.to(tl.float32) * row[:, None], 0)[None, :] + tl.zeros([BN, BR], dtype=tl.float32)
    else:
        rows = tl.load(x + n[:, None] * D + c[None, :], mask=(n < N)[:, None] & (c < D)[None, :], other=0.0)
        value = tl.dot(rows, factor)
    ALL: tl.constexpr = R0 + R1 + R2 + R3 + R4
    at = (part * N + n[:, None]) * ALL + place + column[None, :]
    tl.store(low + at, value, mask=(n < N)[:, None] & inside[None, :])


@triton.jit
def second_kernel(
    low, w0, w1, w2, w3, w4, y0, y1, y2, y3, y4,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, R4: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr, A4: tl.constexpr,
    CODES: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BA outputs, of one factor after the other. CODES: of the activations, two bits each."""
    tile = tl.program_id(0)
    T0: tl.constexpr = (A0 + BA - 1) // BA
    T1: tl.constexpr = T0 + (A1 + BA - 1) // BA
    T2: tl.constexpr = T1 + (A2 + BA - 1) // BA
    T3: tl.constexpr = T2 + (A3 + BA - 1) // BA
    w, y = (
        pick_pointer(tile, T0, T1, T2, T3, w0, w1, w2, w3, w4),
        pick_pointer(tile, T0, T1, T2, T3, y0, y1, y2, y3, y4),
    )
    R = pick(tile, T0, T1, T2, T3, R0, R1, R2, R3, R4)
    A = pick(tile, T0, T1, T2, T3, A0, A1, A2, A3, A4)
    first = pick(tile, T0, T1, T2, T3, 0, T0, T1, T2, T3)
    place = pick(tile, T0, T1, T2, T3, 0, R0, R0 + R1, R0 + R1 + R2, R0 + R1 + R2 + R3)
    code = (CODES >> 2 * pick(tile, T0, T1, T2, T3, 0, 1, 2, 3, 4)) & 3
    ALL: tl.constexpr = R0 + R1 + R2 + R3 + R4
    row = (tile - first) * BA + tl.arange(0, BA)
    inside = row < A
    n, part = tl.arange(0, BN), tl.arange(0, BP)
    total = tl.zeros([BN, BA], dtype=tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        known = (part < PARTS)[:, None, None] & (n < N)[None, :, None] & (r < R)[None, None, :]
        at = (part[:, None, None] * N + n[None, :, None]) * ALL + place + r[None, None, :]
        sums = tl.sum(tl.load(low + at, mask=known, other=0.0), 0)
        sums = sums.to(y.dtype.element_ty).to(tl.float32)
        if code == 1:
            sums = 2 * tl.sigmoid(2 * sums) - 1
        elif code == 2:
            sums = tl.sigmoid(sums)
        factor = tl.load(w + r[:, None] * A + row[None, :], mask=(r < R)[:, None] & inside[None, :], other=0.0)
        rounded = sums.to(y.dtype.element_ty)
        if N == 1:
            one = tl.sum(rounded.to(tl.float32), 0)
            total += tl.sum(factor.to(tl.float32) * one[:, None], 0)[None, :]
        else:
            total = tl.dot(rounded, factor, total)
    store_rows(y, total, row, inside, A, N, BN)


def low_rank_pairs_triton(
    xs_BTD: Sequence[Tensor],
    firsts_DR: Sequence[Tensor],
    seconds_RA: Sequence[Tensor],
    activations: Sequence[Activation | None],
) -> list[Tensor]:
    """As `low_rank_pairs`, for checked shapes on a GPU (or in Triton's interpreter)."""
    xs = [x.contiguous() for x in xs_BTD]
    D, lead = xs[0].shape[-1], xs[0].shape[:-1]
    N, parts = lead.numel(), cdiv(D, _PART)
    outs = [x.new_empty(*lead, w.shape[1]) for x, w in zip(xs, seconds_RA, strict=True)]
    ranks, widths = [w.shape[1] for w in firsts_DR], [w.shape[1] for w in seconds_RA]
    low = torch.empty(parts, N, sum(ranks), dtype=torch.float32, device=xs[0].device)
    BN, BR, BA = (1 if N == 1 else 16), 16, 32
    spare = [0] * (MOST_TOGETHER - len(ranks))
    codes = sum(_CODES[activation] << 2 * place for place, activation in enumerate(activations))
    columns = sum(cdiv(rank, BR) for rank in ranks)
    tiles = sum(cdiv(width, BA) for width in widths)
    with on_device_of(xs[0]):
        first_kernel[(columns, parts)](
            *filled(xs), *filled(firsts_DR), low, *ranks, *spare, D=D, N=N, BN=BN, BR=BR, BK=_PART, num_warps=4
        )
        second_kernel[(tiles,)](
            low, *filled(seconds_RA), *filled(outs), *ranks, *spare, *widths, *spare, codes,
            PARTS=parts, BP=power_of_two(parts), N=N, BN=BN, BR=64 if N == 1 else 32, BA=BA, num_warps=4,
        )  # fmt: skip
    return outs
