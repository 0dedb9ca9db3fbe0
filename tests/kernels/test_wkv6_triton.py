"""wkv6 in Triton: interpreted on the CPU, compiled for GPUs that are not here, and run on one that is."""

import pytest
import torch

from radlads.kernels.shared.testing import WKV6_FLOOR, outputs_and_gradients, relative_rms, wkv6_inputs
from radlads.kernels.wkv6 import wkv6

pytest.importorskip("triton")


@pytest.mark.slow
def test_interpreted(interpret):
    interpret("interpreter_wkv6.py")


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 256])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles(target, size, compiler):
    call = f"compile_wkv6('{target}', {size}, {size})"
    code = f"from radlads.kernels.shared.offline import compile_wkv6; assert len({call}) == 5"
    compiler(code)


def test_without_a_gpu_triton_is_refused_in_one_line():
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: the tensors are on cpu, not on a GPU"):
        wkv6(*wkv6_inputs(1, 4, 1, 8), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("log_decay", [None, WKV6_FLOOR, -1e-3])
@pytest.mark.parametrize("size", [16, 64, 96, 128])
def test_on_the_gpu(size, log_decay):
    inputs = wkv6_inputs(2, 333, 2, size, dtype=torch.bfloat16, device="cuda", log_decay=log_decay)
    exact = outputs_and_gradients(wkv6, [x.detach().double().requires_grad_() for x in inputs])
    ours = outputs_and_gradients(wkv6, inputs)
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 5e-3, name
