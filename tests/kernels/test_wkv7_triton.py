"""wkv7 in Triton: interpreted on the CPU, compiled for GPUs that are not here, and run on one that is."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from radlads.kernels.shared.testing import outputs_and_gradients, relative_rms, wkv7_inputs
from radlads.kernels.wkv7 import wkv7, wkv7_delta_step, wkv7_step

pytest.importorskip("triton")

from radlads.kernels.wkv7 import triton_op
from radlads.kernels.wkv7.triton_op import wkv7_triton
from radlads.kernels.wkv7.triton_tuning import current_backend, fused_tuning, hopper_here, hopper_takes


@pytest.mark.slow
def test_interpreted(interpret):
    interpret("interpreter_cases.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "size", "ragged"),
    [
        ("sm_90", 128, True),
        ("sm_90", 64, False),
        ("sm_90", 256, False),
        ("gfx942", 64, True),
        ("gfx942", 128, True),
    ],
)
def test_compiles(target, size, ragged, compiler):
    """Every kernel that this size can take, and within the shared memory of the target."""
    count = 6
    if size <= 64 or (size <= 128 and target == "sm_90"):  # larger tiles do not fit the shared memory of gfx942
        count += 4
    if size <= 128 and target == "sm_90":
        count += 2
    code = f"""
from radlads.kernels.shared.offline import SHARED_BYTES, compile_wkv7
found = compile_wkv7({target!r}, {size}, {size}, ragged={ragged})
assert len(found) == {count}, sorted(found)
too_large = {{name: kernel.metadata.shared for name, kernel in found.items()
             if kernel.metadata.shared > SHARED_BYTES[{target!r}]}}
assert not too_large, too_large
"""
    compiler(code)


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "reason"),
    [
        ("cuda", torch.bfloat16, 256, None),
        ("cuda", torch.float32, 128, None),
        ("cuda", torch.float32, 192, "head sizes above 128 do not fit the shared memory of a GPU in float32"),
        ("cuda", torch.float16, 136, "head sizes above 128 do not fit the shared memory of a GPU in float16"),
        ("hip", torch.bfloat16, 136, "head sizes above 128 do not fit the shared memory of an AMD GPU"),
        ("cuda", torch.bfloat16, 264, "head sizes above 256 are not supported"),
    ],
)
def test_what_the_kernels_take(backend, dtype, size, reason, monkeypatch):
    monkeypatch.setattr(triton_op, "current_backend", lambda: backend)
    found = triton_op.why_not_applicable(SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 1, 1, size)), size, dtype)
    assert found is None if reason is None else found.startswith(reason)


def test_without_a_gpu_triton_is_refused_in_one_line():
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: the tensors are on cpu, not on a GPU"):
        wkv7(*wkv7_inputs(1, 4, 1, 8), backend="triton")


def test_which_kernels_walk():
    choose = partial(fused_tuning, backend="cuda", dtype=torch.bfloat16)
    assert choose(64, 64, 1000, hopper=True).hopper
    assert not choose(64, 64, 1000, hopper=False).hopper
    assert not choose(64, 64, 1000, hopper=True).backward_split
    assert choose(128, 128, 66, hopper=True).backward_split  # two programs a head fill 132 multiprocessors
    assert choose(64, 64, 8, hopper=True) is None
    assert choose(64, 64, 1000, dtype=torch.float32, hopper=True) is None
    assert hopper_takes(96, 96, torch.bfloat16)
    assert not hopper_takes(64, 128, torch.bfloat16)
    assert not hopper_takes(60, 60, torch.bfloat16)
    assert not hopper_takes(64, 64, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "period"), [*((size, period) for size in (16, 64, 96, 128) for period in (None, 1, 4)), (256, None)]
)
def test_on_the_gpu(size, period):
    special = {} if period is None else {"period": period, "iclr": 0.98, "log_decay": -1e-3}
    inputs = wkv7_inputs(2, 333, 2, size, dtype=torch.bfloat16, device="cuda", **special)
    exact = outputs_and_gradients(wkv7, [x.detach().double().requires_grad_() for x in inputs])
    ours = outputs_and_gradients(wkv7, inputs)
    allowed = 3.5e-3 if period is None else 1e-2
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= allowed, name


def fused(size, hopper, heads=1000):
    """Settings of the fused kernels, or a skip where this GPU has none."""
    found = fused_tuning(size, size, heads, torch.bfloat16, current_backend(), hopper=hopper and hopper_here())
    if found is None or found.hopper != hopper:
        pytest.skip("these kernels are for another GPU")
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "hopper", "heads"), [  # 64: so few that two programs share one
    *((size, hopper, 1000) for size in (40, 64, 96, 128) for hopper in (False, True)),
    (64, True, 64), (128, True, 64),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_on_the_gpu(size, hopper, heads, dtype):
    bounds = torch.tensor([0, 0, 17, 50, 50, 333], device="cuda")
    inputs = wkv7_inputs(1, 333, 2, size, dtype=dtype, device="cuda")
    state = torch.randn(5, 2, size, size, device="cuda", requires_grad=True)
    tuning = fused(size, hopper, heads)
    wide = state.detach().double().requires_grad_()
    exact = outputs_and_gradients(wkv7, [x.detach().double().requires_grad_() for x in inputs], wide, cu_seqlens=bounds)
    ours = outputs_and_gradients(wkv7_triton, inputs, state, cu_seqlens=bounds, tuning=tuning)
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 3.5e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("special", [{"period": 1}, {"period": 4}, {"log_decay": -0.6065}, {"log_decay": 0.0}])
def test_fused_hard_inputs_on_the_gpu(size, hopper, special):
    repeats = {"iclr": 0.98, "log_decay": -1e-3} if "period" in special else {}
    inputs = wkv7_inputs(2, 320, 2, size, dtype=torch.bfloat16, device="cuda", **special, **repeats)
    exact = outputs_and_gradients(wkv7, [x.detach().double().requires_grad_() for x in inputs])
    ours = outputs_and_gradients(partial(wkv7_triton, tuning=fused(size, hopper)), inputs)
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= (1e-2 if repeats else 3.5e-3), name


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", [False, True])
def test_chunks_without_reads_or_writes_on_the_gpu(hopper):
    """Scales are found from the largest magnitude: there may be none, and v may be there without U."""
    inputs = [x.detach().clone() for x in wkv7_inputs(1, 256, 2, 64, dtype=torch.bfloat16, device="cuda")]
    r, _, k, v, a, b = inputs
    for x in (r, k, v, a, b):
        x[:, 32:64] = 0
    k[:, 96:128] = b[:, 96:128] = 0
    a[:, :32] = a[:, 160:192] = 0
    r[:, 224:] *= 1e-6
    v[:, 64:96] *= 1e4
    inputs = [x.requires_grad_() for x in inputs]
    exact = outputs_and_gradients(wkv7, [x.detach().double().requires_grad_() for x in inputs])
    ours = outputs_and_gradients(partial(wkv7_triton, tuning=fused(64, hopper)), inputs)
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 3.5e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_two_programs_a_head_find_the_same_gradients_on_the_gpu(size):
    bounds = torch.tensor([0, 0, 17, 50, 50, 333], device="cuda")
    inputs = wkv7_inputs(1, 333, 2, size, dtype=torch.bfloat16, device="cuda")
    alone, shared = (
        outputs_and_gradients(wkv7_triton, inputs, cu_seqlens=bounds, tuning=fused(size, True, heads))
        for heads in (1000, 64)
    )
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.gpu
def test_on_the_gpu_unaligned_inputs():
    tuning = fused(64, True)
    inputs = wkv7_inputs(1, 70, 2, 64, dtype=torch.bfloat16, device="cuda")
    shifted = []
    for x in inputs:
        room = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        shifted.append(room[1:].view_as(x).copy_(x.detach()))
    out, _ = wkv7_triton(*inputs, tuning=tuning)
    assert torch.equal(wkv7_triton(*shifted, tuning=tuning)[0], out)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 32])  # chunks in parallel, and a walk a head
def test_a_long_document_in_more_programs_than_a_grid_has_rows_on_the_gpu(heads):
    """At once and in two pieces with the state between: the same from the first token to the last."""
    T = 2**17 if heads > 2 else 2**20
    assert T * heads // 32 > 65_535
    inputs = [x.detach() for x in wkv7_inputs(1, T, heads, 64, dtype=torch.bfloat16, device="cuda")]
    with torch.no_grad():
        out, final = wkv7(*inputs, output_final_state=True)
        first, state = wkv7(*(x[:, : T // 2] for x in inputs), output_final_state=True)
        second, last = wkv7(*(x[:, T // 2 :] for x in inputs), initial_state=state, output_final_state=True)
    assert relative_rms(first, out[:, : T // 2]) < 3.5e-3
    assert relative_rms(second, out[:, T // 2 :]) < 3.5e-3
    assert relative_rms(last, final) < 3.5e-3


@pytest.mark.gpu
def test_heads_enough_for_the_fused_kernels_repeat_to_the_bit():
    inputs = wkv7_inputs(3, 100, 32, 64, dtype=torch.bfloat16, device="cuda")
    first, second = (outputs_and_gradients(wkv7, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("step", [wkv7_step, wkv7_delta_step])
@pytest.mark.parametrize(("B", "D"), [(3, 64), (13, 128)])  # tiles of a head, and whole heads
def test_step_on_the_gpu_can_be_captured(B, D, step):
    inputs = [x.detach()[:, 0] for x in wkv7_inputs(B, 1, 40, D, dtype=torch.bfloat16, device="cuda")]
    state = torch.randn(B, 40, D, D, device="cuda")
    expected = state.cpu()
    reference = step(*(x.cpu() for x in inputs), expected)
    step(*inputs, state.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*inputs, state)
    graph.replay()
    torch.testing.assert_close(out.cpu(), reference)
    torch.testing.assert_close(state.cpu(), expected, rtol=1e-5, atol=1e-5)
