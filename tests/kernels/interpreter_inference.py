"""The Triton kernels of inference in Triton's interpreter, on the CPU. Run by test_inference.py in a process of its
own: Triton decides when a kernel is defined whether it will be interpreted."""

import pytest
import torch
import triton
from inference_cases import OPERATORS, compare, given

from radlads.kernels.inference import linear_together, rms_norm

assert triton.knobs.runtime.interpret, "run through test_inference.py"


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize(("rows", "width"), [((1, 1), 1100), ((3, 1), 64), ((2, 2), 300), ((16, 1), 80)])
@pytest.mark.parametrize("places", [1, 5])
def test_is_torch(operator, rows, width, places):
    """fp16 and fp32: the interpreter truncates bf16."""
    for dtype in (torch.float16, torch.float32):
        compare(operator, given(operator, rows, width, scale=3, places=places), dtype, "cpu")


def test_vectors_with_a_stride():
    """A gain and a bias that are views of a wider tensor."""
    x, wide, matrix = torch.randn(2, 1, 24), torch.randn(48), torch.randn(24, 24)
    compare(rms_norm, (x, wide[::2], 1e-6), torch.float32, "cpu")
    compare(linear_together, ([x], [matrix], [wide[::2]]), torch.float32, "cpu")
