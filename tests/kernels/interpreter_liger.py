"""liger-kernel's SwiGLU in Triton's interpreter, in place of a family's module. Run by test_fused_modules.py in a
process of its own."""

import copy

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from triton.runtime import interpreter

from radlads.kernels.shared.testing import relative_rms
from radlads.model.training import fused_modules

assert triton.knobs.runtime.interpret, "run through test_fused_modules.py"
_convert = interpreter._implicit_cvt


def _with_floats(value):
    """Scalars as compiled kernels have them; the interpreter leaves a float a float."""
    if not isinstance(value, float):
        return _convert(value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)


interpreter._implicit_cvt = _with_floats


def run(module, dtype, size=()):
    x = torch.randn(2, 7, *size, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    out = module.to(dtype)(x)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], weights)]


@pytest.mark.parametrize("size", [(), (3,)])
def test_is_the_family_s_own(size):
    """In fp32, and in fp16 within its rounding; bf16 is no arithmetic for the interpreter."""
    torch.manual_seed(0)
    own = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4))
    fused = copy.deepcopy(own)
    fused.__class__ = fused_modules._with_forward(LlamaMLP, fused_modules._mlp)
    assert isinstance(fused, LlamaMLP)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2**-10)):
        for ours, theirs in zip(run(fused, dtype, size), run(own, dtype, size), strict=True):
            assert ours.dtype == theirs.dtype
            assert relative_rms(ours, theirs) <= tolerance
