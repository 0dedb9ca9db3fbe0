"""The Triton kernels of wkv6 in Triton's interpreter, on the CPU. Run by test_wkv6_triton.py in a process of its own:
Triton decides when a kernel is defined whether it will be interpreted.

The interpreter rounds to bf16 by cutting off, so bf16 has an allowance of its own.
"""

from functools import partial

import pytest
import torch
import triton

from radlads.kernels.shared.testing import (
    WKV6_FLOOR,
    assert_as_good_as_the_loop,
    assert_autograd_rules,
    outputs_and_gradients,
    relative_rms,
    state_like,
    wkv6_inputs,
)
from radlads.kernels.wkv6 import wkv6
from radlads.kernels.wkv6.triton_op import Wkv6Tuning, wkv6_triton

assert triton.knobs.runtime.interpret, "run through test_wkv6_triton.py"
TINY = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 8e-3}


def assert_right(inputs, initial_state=None, *, decay_slack=1.0, cu_seqlens=None, **options):
    ours, tiny = partial(wkv6_triton, **options), TINY[inputs[3].dtype]
    assert_as_good_as_the_loop(
        wkv6, ours, inputs, initial_state, tiny=tiny, decay_slack=decay_slack, cu_seqlens=cu_seqlens
    )


@pytest.mark.parametrize("T", [1, 2, 32, 63, 65])
def test_lengths(T):
    assert_right(wkv6_inputs(2, T, 1, 16), state_like(2, 1, 16, 16))


@pytest.mark.parametrize(("K", "V"), [(8, 8), (16, 24), (64, 64), (96, 40), (128, 128)])
def test_head_sizes(K, V):
    assert_right(wkv6_inputs(1, 40, 1, K, V), state_like(1, 1, K, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    assert_right(wkv6_inputs(1, 70, 2, 16, dtype=dtype))


def test_mixed_dtypes():
    inputs = wkv6_inputs(1, 40, 1, 16, dtype=torch.bfloat16)
    inputs[1] = inputs[1].detach().float().requires_grad_()
    assert_right(inputs)


@pytest.mark.parametrize("bounds", [[0, 70], [0, 0, 33, 33, 33, 64, 70, 70], [0, 1, 2, 3, 35, 67, 70]])
def test_packed_sequences(bounds):
    assert_right(wkv6_inputs(1, 70, 2, 8, 12), state_like(len(bounds) - 1, 2, 8, 12), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -1.0, WKV6_FLOOR, -12.0])
def test_decays(log_decay, chunk):
    """Beyond the floor the gradient of the decay is itself below rounding, so it is less exact there."""
    inputs = wkv6_inputs(1, 70, 1, 16, log_decay=log_decay)
    decay_slack = 2 if log_decay >= WKV6_FLOOR else 1000
    tuning = Wkv6Tuning(chunk, 16, 4, 1, 16, 4)
    assert_right(inputs, state_like(1, 1, 16, 16), decay_slack=decay_slack, tuning=tuning)


def test_channels_at_the_floor_beside_channels_without_decay():
    inputs = wkv6_inputs(1, 100, 1, 16)
    with torch.no_grad():
        inputs[1][..., ::2], inputs[1][..., 1::4] = WKV6_FLOOR, 0.0
        inputs[2].copy_(torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(2)))
    assert_right(inputs, state_like(1, 1, 16, 16))


def test_hard_resets():
    """Any decay, minus infinity too: nothing overflows."""
    inputs = wkv6_inputs(1, 70, 1, 16)
    with torch.no_grad():
        inputs[1][:, 20] = float("-inf")
        inputs[1][:, 33:60, :, ::2] = -80.0
    ours = outputs_and_gradients(wkv6_triton, inputs)
    expected = outputs_and_gradients(wkv6, inputs, backend="reference")
    for name in ("out", "state", "d r", "d k", "d v"):
        assert relative_rms(ours[name], expected[name]) < 5e-6, name
    assert ours["d log_decay"].isfinite().all()


def test_small_gradients_survive_the_floor():
    inputs = wkv6_inputs(1, 33, 1, 16, log_decay=WKV6_FLOOR)
    out, _ = wkv6_triton(*inputs)
    expected, _ = wkv6(*inputs, backend="reference")
    grads = (torch.autograd.grad(x.sum() * 1e-12, inputs) for x in (out, expected))
    for ours, reference in zip(*grads, strict=True):
        assert relative_rms(ours, reference) < 1e-4


def test_tiles_that_do_not_divide_the_head():
    assert_right(wkv6_inputs(1, 50, 1, 40, 48), state_like(1, 1, 40, 48), tuning=Wkv6Tuning(32, 16, 4, 1, 32, 4))


def test_inputs_need_not_be_contiguous():
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in wkv6_inputs(2, 40, 2, 8)]
    assert_right([x.requires_grad_() for x in inputs])


def test_through_the_front_door():
    inputs = wkv6_inputs(1, 20, 1, 8)
    torch.testing.assert_close(wkv6(*inputs, backend="triton")[0], wkv6(*inputs)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="float64 is not supported"):
        wkv6(*(x.double() for x in inputs), backend="triton")


def test_rules_of_autograd():
    """With the final state, so that each of both outputs is once the one that the loss does not use."""
    assert_autograd_rules(partial(wkv6_triton, output_final_state=True), wkv6_inputs(1, 20, 1, 16))
