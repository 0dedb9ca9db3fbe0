"""The Triton kernels of wkv7 in Triton's interpreter, on the CPU. Run by test_wkv7_triton.py in a process of its own:
Triton decides when a kernel is defined whether it will be interpreted.

The interpreter rounds to bf16 by cutting off, so bf16 has an allowance of its own.
"""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import triton

from radlads.kernels.shared.testing import (
    DECAY_FLOOR,
    assert_as_good_as_the_loop,
    assert_autograd_rules,
    poisoned_memory,
    state_like,
    wkv7_inputs,
)
from radlads.kernels.wkv7 import wkv7
from radlads.kernels.wkv7.decay_range import WATCH, LogDecayRangeError
from radlads.kernels.wkv7.triton_op import wkv7_triton
from radlads.kernels.wkv7.triton_step import wkv7_step_triton
from radlads.kernels.wkv7.triton_tuning import FEWEST_HEADS, Fused, Scan, Tile, Wkv7Tuning, fused_tuning

assert triton.knobs.runtime.interpret, "run through test_wkv7_triton.py"
TINY = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 8e-3}


def assert_right(inputs, initial_state=None, *, slack=1.0, cu_seqlens=None, **options):
    ours, tiny = partial(wkv7_triton, **options), slack * TINY[inputs[3].dtype]
    assert_as_good_as_the_loop(wkv7, ours, inputs, initial_state, tiny=tiny, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("T", [1, 2, 32, 63, 65])
def test_lengths(T):
    assert_right(wkv7_inputs(2, T, 1, 16), state_like(2, 1, 16, 16))


@pytest.mark.parametrize(("K", "V"), [(8, 8), (16, 24), (64, 64), (96, 40), (128, 128)])
def test_head_sizes(K, V):
    assert_right(wkv7_inputs(1, 40, 1, K, V), state_like(1, 1, K, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    assert_right(wkv7_inputs(1, 70, 2, 16, dtype=dtype))


def test_mixed_dtypes():
    inputs = wkv7_inputs(1, 40, 1, 16, dtype=torch.bfloat16)
    inputs[1] = inputs[1].detach().float().requires_grad_()
    assert_right(inputs)


@pytest.mark.parametrize("bounds", [[0, 70], [0, 0, 33, 33, 33, 64, 70, 70], [0, 1, 2, 3, 35, 67, 70]])
def test_packed_sequences(bounds):
    assert_right(wkv7_inputs(1, 70, 2, 8, 12), state_like(len(bounds) - 1, 2, 8, 12), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("period", [1, 4])
def test_repeated_keys(period):
    assert_right(wkv7_inputs(1, 128, 1, 16, period=period, iclr=0.98, log_decay=-1e-3), slack=10)


@pytest.mark.parametrize("log_decay", [0.0, DECAY_FLOOR, -2.0])
def test_decays(log_decay):
    assert_right(wkv7_inputs(1, 64, 1, 16, log_decay=log_decay), state_like(1, 1, 16, 16), slack=10)


@pytest.mark.parametrize("chunk", [16, 64])
def test_other_chunks_and_tiles(chunk):
    tuning = Wkv7Tuning(chunk, 4, Scan(16, 4, 2), Scan(32, 4, 1), Tile(16, 32, 4), Tile(32, 16, 4))
    assert_right(wkv7_inputs(1, 100, 1, 40, 48), state_like(1, 1, 40, 48), tuning=tuning)


def test_inputs_need_not_be_contiguous():
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in wkv7_inputs(2, 40, 2, 8)]
    assert_right([x.requires_grad_() for x in inputs])


def test_forward_alone_keeps_nothing_for_backward():
    inputs = wkv7_inputs(1, 40, 1, 8)
    expected, _ = wkv7(*inputs)
    with torch.no_grad(), poisoned_memory():
        out, state = wkv7_triton(*inputs)
    assert state is None
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("K", "V"), [(8, 12), (64, 64), (96, 80)])
def test_step(K, V):
    inputs = [x.detach() for x in wkv7_inputs(2, 3, 2, K, V)]
    expected, last = wkv7(*inputs, output_final_state=True)
    state = torch.zeros(2, 2, K, V)
    out = torch.stack([wkv7_step_triton(*(x[:, t] for x in inputs), state) for t in range(3)], 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    r, log_decay, k, v, a, _ = (x[:, 0] for x in inputs)
    kk, iclr, other = -a, torch.rand_like(a), state.clone()
    expected = wkv7_step_triton(r, log_decay, k, v, -kk, kk * iclr, state)
    torch.testing.assert_close(wkv7_step_triton(r, log_decay, k, v, kk, iclr, other, delta=True), expected)
    torch.testing.assert_close(other, state)


def test_through_the_front_door():
    inputs = wkv7_inputs(1, 20, 1, 8)
    torch.testing.assert_close(wkv7(*inputs, backend="triton")[0], wkv7(*inputs)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="float64 is not supported"):
        wkv7(*(x.double() for x in inputs), backend="triton")


FUSED = Fused(1, 4, 1, 4, 1)
KEPT = Fused(1, 4, 1, 4, 1, 4)


@pytest.mark.parametrize(("T", "H"), [(1, 1), (15, 1), (16, 1), (17, 2), (31, 1), (33, 1), (49, 1), (64, 1)])
def test_fused_lengths(T, H):
    assert_right(wkv7_inputs(2, T, H, 16), state_like(2, H, 16, 16), tuning=FUSED)


@pytest.mark.parametrize(("K", "V"), [(8, 8), (16, 24), (64, 64), (96, 40), (128, 128)])
def test_fused_head_sizes(K, V):
    assert_right(wkv7_inputs(1, 40, 1, K, V), state_like(1, 1, K, V), tuning=FUSED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_is_chosen_for_half_precision(dtype):
    assert_right(wkv7_inputs(1, 34, 2, 16, dtype=dtype))
    assert isinstance(fused_tuning(16, 16, FEWEST_HEADS, dtype, "cuda"), Fused)
    assert fused_tuning(16, 16, FEWEST_HEADS - 1, dtype, "cuda") is None


@pytest.mark.parametrize(
    ("bounds", "tuning"),
    [
        ([0, 70], FUSED),
        ([0, 0, 33, 33, 33, 64, 70, 70], FUSED),
        ([0, 0, 33, 33, 33, 64, 70, 70], KEPT),
        ([0, 1, 2, 3, 35, 67, 70], FUSED),
        ([0, 17, 48, 70], KEPT),
    ],
)
def test_fused_packed(bounds, tuning):
    inputs = wkv7_inputs(1, 70, 2, 16)
    bounds = torch.tensor(bounds)
    assert_right(inputs, state_like(bounds.numel() - 1, 2, 16, 16), cu_seqlens=bounds, tuning=tuning)


@pytest.mark.parametrize("special", [{"log_decay": DECAY_FLOOR}, {"period": 1, "iclr": 0.98, "log_decay": -1e-3}])
def test_fused_hard_inputs(special):
    for tuning in (FUSED, KEPT):
        assert_right(wkv7_inputs(1, 66, 1, 16, **special), slack=4.0, tuning=tuning)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_fused_scales_with_its_inputs(scale):
    inputs = wkv7_inputs(1, 50, 1, 16)
    for index in (2, 3):  # k and v
        inputs[index] = (inputs[index].detach() * scale).requires_grad_()
    assert_right(inputs, tuning=FUSED)


def test_fused_refuses_a_decay_beyond_its_range():
    WATCH.settle()
    inputs = wkv7_inputs(1, 64, 1, 16)
    inputs[1] = torch.full_like(inputs[1], -0.7)
    wkv7_triton(*inputs, tuning=FUSED)
    with pytest.raises(LogDecayRangeError, match=r"log decay of -0\.7; the Triton kernels take at most 0\.67"):
        WATCH.settle()


@pytest.mark.parametrize(("value", "told"), [(-math.inf, "-inf"), (math.nan, None)])
def test_fused_tells_an_endless_decay_from_no_number(value, told):
    """A NaN comes of weights that are none: it shows in the output, and is no matter of the range."""
    WATCH.settle()
    inputs = wkv7_inputs(1, 64, 1, 16)
    inputs[1] = torch.full_like(inputs[1], -0.2).index_fill(1, torch.tensor([20]), value)
    out, _ = wkv7_triton(*inputs, tuning=FUSED)
    assert out.isnan().any()
    with pytest.raises(LogDecayRangeError, match=f"had a log decay of {told};") if told else nullcontext():
        WATCH.settle()


def test_fused_counts_every_token_of_each_half():
    """Too much for the second half of a chunk only together with its first token."""
    WATCH.settle()
    inputs = wkv7_inputs(1, 32, 1, 16)
    decay = torch.full_like(inputs[1], -0.2)
    decay[:, 16], decay[:, 17:] = -6.0, -0.4
    inputs[1] = decay
    wkv7_triton(*inputs, tuning=FUSED)
    with pytest.raises(LogDecayRangeError):
        WATCH.settle()


@pytest.mark.parametrize("tuning", [None, FUSED])
def test_any_default_device(tuning):
    """With `meta`, a tensor that is made on the default device shows."""
    inputs, bounds = wkv7_inputs(1, 40, 1, 16), torch.tensor([0, 9, 9, 40])
    with torch.device("meta"):
        out, _ = wkv7_triton(*inputs, tuning=tuning, cu_seqlens=bounds)
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(x.device.type == "cpu" for x in (out, *gradients))


@pytest.mark.parametrize(("T", "K", "V"), [(17, 256, 256), (20, 144, 200), (20, 136, 40), (20, 40, 136)])
def test_wide_heads(T, K, V):
    tuning = Wkv7Tuning(16, 8, Scan(64, 8, 1), Scan(64, 8, 1), Tile(64, 64, 4), Tile(64, 64, 4))
    assert_right(wkv7_inputs(1, T, 1, K, V), state_like(1, 1, K, V), tuning=tuning)


@pytest.mark.parametrize("tuning", [None, FUSED, KEPT])
def test_rules_of_autograd(tuning):
    """With the final state, so that each of both outputs is once the one that the loss does not use."""
    assert_autograd_rules(partial(wkv7_triton, tuning=tuning, output_final_state=True), wkv7_inputs(1, 20, 1, 16))
