"""The Triton kernels of inference in Triton's interpreter, on the CPU. Run by test_inference.py in a process of its
own: Triton decides when a kernel is defined whether it will be interpreted."""

import pytest
import torch
import triton
from inference_cases import OPERATORS, compare, given

assert triton.knobs.runtime.interpret, "run through test_inference.py"


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize(("rows", "width"), [((1, 1), 1100), ((3, 1), 64), ((2, 2), 300), ((16, 1), 80)])
@pytest.mark.parametrize("places", [1, 3, 5])
def test_is_torch(operator, rows, width, places):
    """fp16 and fp32: the interpreter truncates bf16."""
    for dtype in (torch.float16, torch.float32):
        compare(operator, given(operator, rows, width, scale=3, places=places), dtype, "cpu")
