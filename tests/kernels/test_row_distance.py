"""The squared distance of rows: its torch form, its refusals, and the Triton form on a GPU (in the interpreter:
interpreter_operands.py)."""

from __future__ import annotations

import pytest
import torch

from radlads.kernels.row_distance import squared_distance
from radlads.kernels.shared.testing import relative_rms


def outputs(width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    out, wanted = (torch.randn(2, 37, width, generator=generator).to(device, dtype) for _ in range(2))
    wanted[0, 3] = out[0, 3]
    return out.requires_grad_(), wanted, torch.rand(2, 37, generator=generator).to(device)


def distance_and_gradient(out, wanted, factors, backend=None):
    square = squared_distance(out, wanted, backend=backend)
    (gradient,) = torch.autograd.grad((square * factors).sum(), out)
    return square, gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_torch_form(dtype):
    out, wanted, factors = outputs(48, dtype)
    square, gradient = distance_and_gradient(out, wanted, factors)
    difference = out.detach().double() - wanted.double()
    assert square.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(square.double(), difference.square().sum(-1), rtol=1e-6, atol=0)
    expected = (2 * factors[..., None] * difference).to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert square[0, 3] == 0


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match=r"of one shape are needed, got \(2, 3, 4\) and \(2, 3, 5\)"):
        squared_distance(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: the tensors are on cpu, not on a GPU"):
        squared_distance(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 3584, 6144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(width, dtype):
    """No further from fp64 than the torch form with the same bits."""
    given = outputs(width, dtype, "cuda")
    out, wanted, factors = given
    exact = distance_and_gradient(out.detach().double().requires_grad_(), wanted.double(), factors.double())
    ours, theirs = (distance_and_gradient(*given, backend=name) for name in ("triton", "torch"))
    for mine, plain, truth in zip(ours, theirs, exact, strict=True):
        assert relative_rms(mine, truth) <= max(1.02 * relative_rms(plain, truth), 1e-6)
