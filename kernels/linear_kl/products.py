"""Matrix products with fp32 sums for low-precision operands, and the size of a chunk of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}  # of fp32 logits; about four such buffers are alive at a time
_LOW = (torch.bfloat16, torch.float16)


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def chunk_rows(num_tokens: int, vocab: int, device: torch.device) -> int:
    """How many tokens' logits are held at a time."""
    rows = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * vocab)
    return max(1, min(num_tokens, max(rows, 16) if rows < 128 else rows // 128 * 128))


class Operand:
    """One head [V,E], ready for products: as it is where the GPU multiplies it with fp32 sums, else widened once."""

    def __init__(self, head_VE: Tensor, hidden_dtype: torch.dtype, dtype: torch.dtype) -> None:
        self.narrow = head_VE.is_cuda and head_VE.dtype == hidden_dtype and hidden_dtype in _LOW
        self.dtype = dtype
        self.head_VE = head_VE if self.narrow else head_VE.to(dtype)

    def logits(self, hidden_nE: Tensor) -> Tensor:
        """[n,E] -> [n,V] in the accumulation dtype."""
        if self.narrow:
            return torch.mm(hidden_nE, self.head_VE.t(), out_dtype=self.dtype)
        return hidden_nE.to(self.dtype) @ self.head_VE.t()

    def pull_back(self, grad_nV: Tensor) -> Tensor:
        """[n,V] -> [n,E]: the gradient of the logits taken to the hidden states."""
        if self.narrow:
            return torch.mm(grad_nV.to(self.head_VE.dtype), self.head_VE, out_dtype=self.dtype)
        return grad_nV @ self.head_VE

    def add_outer(self, total_VE: Tensor, grad_nV: Tensor, hidden_nE: Tensor) -> None:
        """total += gradᵀ hidden, in place: the gradient of the logits taken to the head."""
        if self.narrow:
            left = grad_nV.to(self.head_VE.dtype).t()
            right = hidden_nE.to(self.head_VE.dtype)
            torch.addmm(total_VE, left, right, out_dtype=self.dtype, out=total_VE)
        else:
            total_VE.addmm_(grad_nV.t(), hidden_nE.to(self.dtype))


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as `torch.nn.functional.linear` would under an active autocast; the casts are differentiable."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def kept(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient as it waits for backward: fp16 could not hold values below 6e-8, so those stay fp32 until scaled."""
    return grad if like.dtype == torch.float16 else grad.to(like.dtype)
