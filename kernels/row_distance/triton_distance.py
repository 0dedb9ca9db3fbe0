"""The Triton form of squared_distance: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.triton_launch import on_device_of

_BLOCK = 4096


@triton.jit
def distance_kernel(out, wanted, square, D, BLOCK: tl.constexpr):
    """square[n] = Σ (out − wanted)² of row n [D]. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < D
        x = tl.load(out + row * D + c, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(wanted + row * D + c, mask=inside, other=0.0).to(tl.float32)
        total += (x - y) * (x - y)
    tl.store(square + row, tl.sum(total))


@triton.jit
def distance_gradient_kernel(out, wanted, dsquare, dout, D, BLOCK: tl.constexpr):
    """dout = 2 · dsquare[n] · (out − wanted). Grid: rows × blocks of a row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < D
    x = tl.load(out + row * D + c, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(wanted + row * D + c, mask=inside, other=0.0).to(tl.float32)
    gradient = 2.0 * tl.load(dsquare + row) * (x - y)
    tl.store(dout + row * D + c, gradient.to(dout.dtype.element_ty), mask=inside)


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, out: Tensor, wanted: Tensor) -> Tensor:
        ctx.save_for_backward(out, wanted)
        square = out.new_empty(out.shape[:-1], dtype=torch.float32)
        if square.numel():
            with on_device_of(out):
                distance_kernel[(square.numel(),)](out, wanted, square, out.shape[-1], BLOCK=_block(out))
        return square

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dsquare: Tensor) -> tuple[Tensor, None]:
        out, wanted = ctx.saved_tensors
        dout, width = torch.empty_like(out), out.shape[-1]
        if dsquare.numel():
            grid = (dsquare.numel(), triton.cdiv(width, _block(out)))
            with on_device_of(out):
                distance_gradient_kernel[grid](out, wanted, dsquare.contiguous(), dout, width, BLOCK=_block(out))
        return dout, None


def _block(x: Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(x.shape[-1]))


def squared_distance_triton(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """As `squared_distance`, for checked tensors on a GPU (or in Triton's interpreter)."""
    square: Tensor = _SquaredDistance.apply(out_BTD.contiguous(), wanted_BTD.contiguous())
    return square
