"""wkv7 in Triton: interpreted on the CPU, compiled for GPUs that are not here, and run on one that is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from radlads.kernels.testing import outputs_and_gradients, relative_rms, wkv7_inputs
from radlads.kernels.wkv7 import wkv7, wkv7_step

pytest.importorskip("triton")

from radlads.kernels.wkv7.triton_op import wkv7_triton
from radlads.kernels.wkv7.triton_tuning import Fused


def run_python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
def test_interpreted():
    cases = Path(__file__).with_name("interpreter_cases.py")
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases), TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64, 96, 128])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles(target, size, tmp_path):
    fused = size <= 64 or target == "sm_90"  # a larger head's tiles do not fit the shared memory of gfx942
    code = f"from radlads.kernels.offline import compile_wkv7; assert len(compile_wkv7('{target}', {size}, {size})) == "
    code += "10" if fused else "6"
    run_python("-c", code, TRITON_CACHE_DIR=str(tmp_path))


def test_without_a_gpu_triton_is_refused_in_one_line():
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: the tensors are on cpu, not on a GPU"):
        wkv7(*wkv7_inputs(1, 4, 1, 8), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("period", [None, 1, 4])
@pytest.mark.parametrize("size", [16, 64, 96, 128])
def test_on_the_gpu(size, period):
    special = {} if period is None else {"period": period, "iclr": 0.98, "log_decay": -1e-3}
    inputs = wkv7_inputs(2, 333, 2, size, dtype=torch.bfloat16, device="cuda", **special)
    exact = outputs_and_gradients(wkv7, [x.detach().double().requires_grad_() for x in inputs])
    ours = outputs_and_gradients(wkv7, inputs)
    allowed = 3.5e-3 if period is None else 1e-2
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("tuning", [Fused(1, 4, 1, 4, 1), Fused(2, 8, 1, 8, 2), Fused(1, 4, 1, 4, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_on_the_gpu(tuning, dtype):
    bounds = torch.tensor([0, 0, 17, 50, 50, 333], device="cuda")
    inputs = wkv7_inputs(1, 333, 2, 64, dtype=dtype, device="cuda")
    state = torch.randn(5, 2, 64, 64, device="cuda", requires_grad=True)
    wide = state.detach().double().requires_grad_()
    exact = outputs_and_gradients(wkv7, [x.detach().double().requires_grad_() for x in inputs], wide, cu_seqlens=bounds)
    ours = outputs_and_gradients(wkv7_triton, inputs, state, cu_seqlens=bounds, tuning=tuning)
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 3.5e-3, name


@pytest.mark.gpu
def test_heads_enough_for_the_fused_kernels_repeat_to_the_bit():
    inputs = wkv7_inputs(3, 100, 32, 64, dtype=torch.bfloat16, device="cuda")
    first, second = (outputs_and_gradients(wkv7, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_step_on_the_gpu_can_be_captured():
    inputs = [x.detach()[:, 0] for x in wkv7_inputs(3, 1, 4, 64, dtype=torch.bfloat16, device="cuda")]
    state = torch.randn(3, 4, 64, 64, device="cuda")
    expected = state.cpu()
    reference = wkv7_step(*(x.cpu() for x in inputs), expected)
    wkv7_step(*inputs, state.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wkv7_step(*inputs, state)
    graph.replay()
    torch.testing.assert_close(out.cpu(), reference)
    torch.testing.assert_close(state.cpu(), expected, rtol=1e-5, atol=1e-5)
