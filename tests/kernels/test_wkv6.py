"""wkv6 on the CPU: against the recurrence in fp64, never worse than twice the loop in the same dtype."""

import pytest
import torch

from radlads.kernels.shared.testing import WKV6_FLOOR, outputs_and_gradients, poisoned_memory, relative_rms, wkv6_inputs
from radlads.kernels.wkv6 import wkv6, wkv6_step

# In fp32 the cumulative decay of a chunk reaches 80 nats, whose last bit is 4e-6 of the factor it stands for.
TINY = {torch.float64: 1e-14, torch.float32: 4e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def state_like(N, H, K, V, dtype=torch.float32, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, H, K, V, generator=generator, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()


def assert_as_good_as_the_loop(inputs, initial_state=None, *, slack=1.0, **options):
    """The rule of the house: error(chunked) <= 2 error(loop, same dtype) + tiny, both against the loop in fp64."""
    exact_state = None if initial_state is None else initial_state.detach().double().requires_grad_()
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = outputs_and_gradients(wkv6, exact_inputs, exact_state, backend="reference", **options)
    loop = outputs_and_gradients(wkv6, inputs, initial_state, backend="reference", **options)
    with poisoned_memory():
        ours = outputs_and_gradients(wkv6, inputs, initial_state, backend="chunked", **options)
    dtype = inputs[3].dtype
    assert all(torch.equal(x.double(), y) for x, y in zip(inputs, exact_inputs, strict=True)), "inputs were written to"
    for name, reference in exact.items():
        assert ours[name].dtype == loop[name].dtype, name
        allowed = 2 * relative_rms(loop[name], reference) + slack * TINY[dtype]
        error = relative_rms(ours[name], reference)
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 65])
def test_output_state_and_gradients(T, dtype):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert_as_good_as_the_loop(wkv6_inputs(2, T, 2, 16, 24, dtype=dtype), state_like(2, 2, 16, 24, state_dtype))


@pytest.mark.parametrize(("K", "V"), [(8, 8), (64, 64), (96, 40), (1, 3)])
def test_head_sizes(K, V):
    assert_as_good_as_the_loop(wkv6_inputs(1, 40, 2, K, V))


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -0.1, -1.0, WKV6_FLOOR, -20.0, -1000.0, 0.05])
def test_any_decay(log_decay):
    """Beyond the floor the gradient of the decay is itself below rounding, so it is less exact there."""
    inputs = wkv6_inputs(1, 70, 2, 8, log_decay=log_decay)
    assert_as_good_as_the_loop(inputs, state_like(1, 2, 8, 8), slack=1 if log_decay >= WKV6_FLOOR else 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_at_the_floor_beside_channels_without_decay(dtype):
    inputs = wkv6_inputs(1, 100, 2, 16, dtype=dtype)
    with torch.no_grad():
        inputs[1][..., ::2], inputs[1][..., 1::4] = WKV6_FLOOR, 0.0
        inputs[2].copy_(torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(2)))
    assert_as_good_as_the_loop(inputs, state_like(1, 2, 16, 16))


def test_small_gradients_survive_the_floor():
    """A loss over many tokens has gradients of 1e-9 and less; exp(-40) of them must not be lost."""
    inputs = wkv6_inputs(1, 33, 1, 8, log_decay=WKV6_FLOOR)
    out, _ = wkv6(*inputs)
    expected, _ = wkv6(*inputs, backend="reference")
    for ours, reference in zip(
        torch.autograd.grad(out.sum() * 1e-12, inputs), torch.autograd.grad(expected.sum() * 1e-12, inputs), strict=True
    ):
        assert relative_rms(ours, reference) < 1e-4


def test_a_hard_reset_inside_a_chunk():
    inputs = wkv6_inputs(1, 50, 1, 8)
    with torch.no_grad():
        inputs[1][:, 20] = float("-inf")
        inputs[1][:, 33, :, ::2] = -30.0
    out, state = wkv6(*inputs, output_final_state=True)
    expected, expected_state = wkv6(*inputs, output_final_state=True, backend="reference")
    assert relative_rms(out, expected) < 1e-6
    assert relative_rms(state, expected_state) < 1e-6
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


BOUNDARIES = {
    "one": [0, 90],
    "ragged": [0, 1, 3, 35, 67, 90],
    "empty ones": [0, 0, 33, 33, 33, 64, 90, 90],
    "chunk edges": [0, 16, 64, 90],
    "single tokens": [0, 1, 2, 3, 90],
}


@pytest.mark.parametrize("bounds", BOUNDARIES.values(), ids=BOUNDARIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences(bounds, dtype):
    state = state_like(len(bounds) - 1, 2, 8, 12)
    assert_as_good_as_the_loop(wkv6_inputs(1, 90, 2, 8, 12, dtype=dtype), state, cu_seqlens=torch.tensor(bounds))


def test_packed_equals_dense():
    inputs = wkv6_inputs(3, 37, 2, 16)
    dense = outputs_and_gradients(wkv6, inputs, backend="chunked")
    packed = [x.detach().reshape(1, -1, *x.shape[2:]).requires_grad_() for x in inputs]
    other = outputs_and_gradients(wkv6, packed, cu_seqlens=torch.tensor([0, 37, 74, 111], dtype=torch.int32))
    for name, x in dense.items():
        torch.testing.assert_close(other[name].reshape(x.shape), x, rtol=1e-5, atol=1e-5)


def test_sequences_do_not_leak_not_even_nan():
    inputs = [x.detach() for x in wkv6_inputs(1, 60, 1, 8)]
    for x in inputs:
        x[:, :20] = float("nan")
    out, state = wkv6(*inputs, cu_seqlens=torch.tensor([0, 20, 60]), output_final_state=True)
    assert out[:, 20:].isfinite().all()
    assert state[1].isfinite().all()


@pytest.mark.parametrize("cut", [1, 16, 29])
def test_split_anywhere_and_pass_the_state(cut):
    inputs = [x.detach() for x in wkv6_inputs(2, 45, 2, 8)]
    out, state = wkv6(*inputs, output_final_state=True)
    first, carried = wkv6(*(x[:, :cut] for x in inputs), output_final_state=True)
    second, last = wkv6(*(x[:, cut:] for x in inputs), initial_state=carried, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


def test_step_equals_prefill():
    inputs = [x.detach() for x in wkv6_inputs(2, 40, 3, 16, 24)]
    out, state = wkv6(*inputs, output_final_state=True)
    running = torch.zeros(2, 3, 16, 24)
    storage = running.data_ptr()
    stepped = torch.stack([wkv6_step(*(x[:, t] for x in inputs), running) for t in range(40)], 1)
    assert running.data_ptr() == storage
    torch.testing.assert_close(stepped, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running, state, rtol=1e-5, atol=1e-5)


def test_step_on_a_strided_state_and_low_precision_inputs():
    inputs = [x.detach()[:, 0] for x in wkv6_inputs(2, 1, 3, 8, dtype=torch.bfloat16)]
    cache = torch.randn(4, 3, 8, 8)
    expected = cache.clone()
    rows = cache[::2]
    out = wkv6_step(*inputs, rows)
    reference, state = wkv6(
        *(x[:, None] for x in inputs), initial_state=expected[::2], output_final_state=True, backend="reference"
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, reference[:, 0])
    torch.testing.assert_close(rows, state)
    torch.testing.assert_close(cache[1::2], expected[1::2])


def test_inputs_need_not_be_contiguous():
    inputs = wkv6_inputs(2, 40, 2, 8)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    strided[2] = inputs[2].detach()[:, :, :1].expand(-1, -1, 2, -1).requires_grad_()
    inputs[2] = strided[2].detach().clone().requires_grad_()
    whole, other = outputs_and_gradients(wkv6, inputs), outputs_and_gradients(wkv6, strided)
    for name in whole:
        torch.testing.assert_close(other[name], whole[name])


def test_gradient_check():
    inputs = wkv6_inputs(1, 5, 1, 3, 2, dtype=torch.float64)
    state = state_like(1, 1, 3, 2, torch.float64)

    def operator(*args):
        return wkv6(*args[:4], initial_state=args[4], output_final_state=True)

    assert torch.autograd.gradcheck(operator, (*inputs, state))


def test_autocast_does_not_reach_inside():
    inputs = wkv6_inputs(1, 40, 2, 16)
    out, _ = wkv6(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, _ = wkv6(*inputs)
    torch.testing.assert_close(other, out)


def test_no_final_state_unless_asked_and_frozen_inputs_get_no_gradient():
    inputs = wkv6_inputs(1, 8, 1, 8)
    inputs[0] = inputs[0].detach()
    out, state = wkv6(*inputs)
    assert state is None
    out.sum().backward()
    assert inputs[0].grad is None
    assert inputs[1].grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"r_BTHK": x[0][:, :-1]}, "wkv6: r must have k's shape"),
        (lambda x: {"v_BTHV": x[3][:, :, :1]}, "wkv6: v must be"),
        (lambda x: {"k_BTHK": x[2][0]}, "wkv6: k and v must be"),
        (lambda x: {"log_decay_BTHK": x[1].long()}, "log_decay must be bfloat16"),
        (lambda x: {"initial_state": torch.zeros(2, 2, 8, 9)}, "initial_state must be"),
        (lambda x: {"cu_seqlens": torch.tensor([0, 10])}, "batch must be 1"),
        (lambda x: {"backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change, message):
    inputs = wkv6_inputs(2, 10, 2, 8)
    names = ("r_BTHK", "log_decay_BTHK", "k_BTHK", "v_BTHV")
    with pytest.raises(ValueError, match=message) as error:
        wkv6(**(dict(zip(names, inputs, strict=True)) | change(inputs)))
    assert "\n" not in str(error.value)


def test_wrong_boundaries_are_refused():
    with pytest.raises(ValueError, match="wkv6: cu_seqlens must start at 0"):
        wkv6(*wkv6_inputs(1, 10, 1, 8), cu_seqlens=torch.tensor([0, 7, 5, 10]))


def test_step_refuses_a_state_that_does_not_fit():
    inputs = [x[:, 0] for x in wkv6_inputs(1, 1, 2, 8)]
    with pytest.raises(ValueError, match="wkv6_step: v must be"):
        wkv6_step(*inputs, torch.zeros(1, 2, 8, 16))
