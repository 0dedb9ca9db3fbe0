"""Matrix products with fp32 sums for low-precision operands, and the accumulated gradient of a head.

Dims: V vocabulary, E width, n tokens of a tile or block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)
_SLAB_ROUND = 128  # rows: whole product tiles, and aligned slab starts
_SLABS = 2  # of the head gradient: casting one at a time needs a quarter more memory instead of half more


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


class Operand:
    """A head [V,E] as product operand: unchanged if the GPU multiplies it with fp32 sums, else cast once."""

    def __init__(self, head_VE: Tensor, hidden_dtype: torch.dtype, dtype: torch.dtype) -> None:
        self.narrow = head_VE.is_cuda and head_VE.dtype == hidden_dtype and hidden_dtype in _LOW
        self.dtype = dtype
        self.head_VE = head_VE if self.narrow else head_VE.to(dtype)
        self.grad_dtype = head_VE.dtype if self.narrow else dtype  # dtype of logit gradients in products

    def logits(self, hidden_nE: Tensor, out_nV: Tensor) -> None:
        """Logits [n,E] -> [n,V], rounded once to the dtype of `out_nV`."""
        if self.narrow:
            torch.mm(hidden_nE, self.head_VE.t(), out_dtype=out_nV.dtype, out=out_nV)
        elif out_nV.dtype == self.dtype:
            torch.mm(hidden_nE.to(self.dtype), self.head_VE.t(), out=out_nV)
        else:
            out_nV.copy_(hidden_nE.to(self.dtype) @ self.head_VE.t())

    def pull_back(self, grad_nV: Tensor) -> Tensor:
        """Logit gradient [n,V] -> hidden-state gradient [n,E] in the accumulation dtype."""
        if self.narrow:
            return torch.mm(grad_nV, self.head_VE, out_dtype=self.dtype)
        return grad_nV @ self.head_VE


class HeadGradient:
    """Accumulates gradᵀ hidden over the blocks of a batch, in the accumulation dtype.

    `add_outer(total, grad, hidden, begun)` stores (begun False) or adds a product; None: the library's product.
    """

    def __init__(self, operand: Operand, add_outer: Callable[[Tensor, Tensor, Tensor, bool], None] | None) -> None:
        V, E = operand.head_VE.shape
        self.operand, self.add_outer = operand, add_outer or self._add_outer
        rows = -(-V // (_SLABS * _SLAB_ROUND)) * _SLAB_ROUND
        self.bounds = [min(V, rows * i) for i in range(-(-V // rows) + 1)]
        self.slabs: list[Tensor] = [
            torch.empty(stop - start, E, dtype=operand.dtype, device=operand.head_VE.device)
            for start, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True)
        ]
        self.begun = False

    def add(self, grad_nV: Tensor, hidden_nE: Tensor) -> None:
        right = hidden_nE.to(self.operand.grad_dtype)
        for i, total in enumerate(self.slabs):
            self.add_outer(total, grad_nV[:, self.bounds[i] : self.bounds[i + 1]], right, self.begun)
        self.begun = True

    def _add_outer(self, total: Tensor, grad: Tensor, right: Tensor, begun: bool) -> None:
        narrow = {"out_dtype": total.dtype} if self.operand.narrow else {}
        if begun:
            torch.addmm(total, grad.t(), right, out=total, **narrow)
        else:
            torch.mm(grad.t(), right, out=total, **narrow)

    def finish(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The gradient [V,E] times `scale` in `dtype`, as row slabs; frees the sum slab by slab."""
        pieces = []
        while self.slabs:
            total = self.slabs.pop(0)
            if not self.begun:
                total.zero_()
            piece = total if total.dtype == dtype else torch.empty_like(total, dtype=dtype)
            pieces.append(torch.mul(total, scale, out=piece))
        return tuple(pieces)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as `torch.nn.functional.linear` does under an active autocast; the casts are differentiable."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def waiting_dtype(like: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient stored until backward: not fp16, which cannot represent unscaled values below 6e-8."""
    return dtype if like.dtype == torch.float16 else like.dtype
