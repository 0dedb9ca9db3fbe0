"""What every recurrence promises, in plain torch on the CPU: against its loop in fp64, never worse than twice the loop
in the same dtype; packed documents, states, steps, padding, gradients and refusals."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from radlads.kernels.gated_delta import gated_delta, gated_delta_step
from radlads.kernels.shared.testing import (
    DECAY_FLOOR,
    GATED_DELTA_NAMES,
    INPUT_NAMES,
    WKV6_FLOOR,
    WKV6_NAMES,
    assert_as_good_as_the_loop,
    gated_delta_inputs,
    outputs_and_gradients,
    relative_rms,
    state_like,
    wkv6_inputs,
    wkv7_inputs,
)
from radlads.kernels.wkv6 import wkv6, wkv6_step
from radlads.kernels.wkv7 import wkv7, wkv7_step

TINY = {torch.float64: 1e-14, torch.float16: 1e-4, torch.bfloat16: 1e-4}


@dataclass(frozen=True)
class Recurrence:
    """chunk: tokens of a chunk for inputs as the mixer makes them. tiny: what fp32 may lose beside the loop. trained:
    the strongest log decay for which the gradient of the decay is as exact as the loop's; beyond, it is itself below
    rounding. passed_over: inputs that are zero at padding."""

    operator: Callable
    step: Callable
    inputs: Callable
    names: tuple[str, ...]
    chunk: int
    tiny: float
    trained: float
    passed_over: tuple[str, ...]

    @property
    def name(self):
        return self.operator.__name__

    def detached(self, *sizes, **options):
        return [x.detach() for x in self.inputs(*sizes, **options)]

    def run(self, inputs, initial_state=None, **options):
        return outputs_and_gradients(self.operator, inputs, initial_state, names=self.names, **options)

    def assert_right(self, inputs, initial_state=None, **options):
        tiny = TINY.get(inputs[-1].dtype, self.tiny)
        chunked = partial(self.operator, backend="chunked")
        options = {"tiny": tiny, "names": self.names, **options}
        assert_as_good_as_the_loop(self.operator, chunked, inputs, initial_state, **options)


RECURRENCES = [
    # In fp32 the cumulative decay of a chunk reaches 80 nats, whose last bit is 4e-6 of the factor it stands for.
    Recurrence(wkv6, wkv6_step, wkv6_inputs, WKV6_NAMES, 16, 4e-6, WKV6_FLOOR, ("log_decay", "k")),
    Recurrence(wkv7, wkv7_step, wkv7_inputs, INPUT_NAMES, 32, 1e-6, -1.0, ("log_decay", "k", "b")),
    # A chunk sums up to 64 products where the loop adds one at a time.
    Recurrence(
        gated_delta, gated_delta_step, gated_delta_inputs, GATED_DELTA_NAMES, 64, 4e-6, -1e9, ("log_decay", "beta")
    ),
]
every = pytest.mark.parametrize("op", RECURRENCES, ids=lambda op: op.name)


def lengths():
    for op in RECURRENCES:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            edges = (1, 2, op.chunk - 1, op.chunk, op.chunk + 1, 3 * op.chunk + 1)
            for T in edges if dtype in (torch.float64, torch.float32) else (1, op.chunk + 1):
                yield pytest.param(op, T, dtype, id=f"{op.name}-{T}-{dtype}")


@pytest.mark.parametrize(("op", "T", "dtype"), lengths())
def test_output_state_and_gradients(op, T, dtype):
    state = state_like(2, 2, 16, 24, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    op.assert_right(op.inputs(2, T, 2, 16, 24, dtype=dtype), state)


@every
@pytest.mark.parametrize(("K", "V"), [(8, 8), (64, 64), (96, 40), (1, 3)])
def test_head_sizes(op, K, V):
    op.assert_right(op.inputs(1, op.chunk + 6, 2, K, V))


@every
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, DECAY_FLOOR, -2.0, WKV6_FLOOR, -20.0, -1000.0, -1e5, 0.05])
def test_any_decay(op, log_decay):
    inputs = op.inputs(1, 70, 2, 8, log_decay=log_decay)
    op.assert_right(inputs, state_like(1, 2, 8, 8), decay_slack=1 if log_decay >= op.trained else 100)


@every
def test_a_hard_reset_inside_a_chunk(op):
    inputs = op.inputs(1, 100, 1, 8)
    with torch.no_grad():
        log_decay = inputs[op.names.index("log_decay")]
        log_decay[:, [20, 21, 70]] = float("-inf")
        log_decay[:, 33, ..., ::2] = -30.0
    out, state = op.operator(*inputs, output_final_state=True)
    expected, expected_state = op.operator(*inputs, output_final_state=True, backend="reference")
    assert relative_rms(out, expected) < 1e-6
    assert relative_rms(state, expected_state) < 1e-6
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def packed():
    for op in RECURRENCES:
        C = op.chunk
        T = 2 * C + 22
        bounds = {
            "one": [0, T],
            "ragged": [0, 1, 3, C + 3, 2 * C + 3, T],
            "empty ones": [0, 0, C + 1, C + 1, C + 1, 2 * C, T, T],
            "chunk edges": [0, C, 2 * C, T],
            "single tokens": [0, 1, 2, 3, T],
        }
        for name, each in bounds.items():
            for dtype in (torch.float32, torch.bfloat16) if name in ("ragged", "empty ones") else (torch.float32,):
                yield pytest.param(op, each, dtype, id=f"{op.name}-{name}-{dtype}")


@pytest.mark.parametrize(("op", "bounds", "dtype"), packed())
def test_packed_sequences(op, bounds, dtype):
    inputs = op.inputs(1, bounds[-1], 2, 8, 12, dtype=dtype)
    op.assert_right(inputs, state_like(len(bounds) - 1, 2, 8, 12), cu_seqlens=torch.tensor(bounds))


@every
def test_packed_equals_dense(op):
    T = op.chunk + 5
    inputs = op.inputs(3, T, 2, 16)
    dense = op.run(inputs, backend="chunked")
    packed = [x.detach().reshape(1, -1, *x.shape[2:]).requires_grad_() for x in inputs]
    other = op.run(packed, cu_seqlens=torch.tensor([0, T, 2 * T, 3 * T], dtype=torch.int32))
    for name, x in dense.items():
        torch.testing.assert_close(other[name].reshape(x.shape), x, rtol=1e-5, atol=1e-5)


@every
def test_sequences_do_not_leak_not_even_nan(op):
    inputs = op.detached(1, 100, 1, 8)
    for x in inputs:
        x[:, :20] = float("nan")
    out, state = op.operator(*inputs, cu_seqlens=torch.tensor([0, 20, 100]), output_final_state=True)
    assert out[:, 20:].isfinite().all()
    assert state[1].isfinite().all()


@every
@pytest.mark.parametrize("cut", [1, 64, 89])
def test_split_anywhere_and_pass_the_state(op, cut):
    inputs = op.detached(2, 100, 2, 8)
    run = partial(op.operator, output_final_state=True)
    out, state = run(*inputs)
    first, carried = run(*(x[:, :cut] for x in inputs))
    second, last = run(*(x[:, cut:] for x in inputs), initial_state=carried)
    torch.testing.assert_close(torch.cat([first, second], 1), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


@every
def test_padding_is_passed_over(op):
    """A token that neither decays nor writes leaves the state as it was."""
    inputs = op.detached(1, 100, 2, 8)
    for name in op.passed_over:
        inputs[op.names.index(name)][:, :40] = 0
    _, state = op.operator(*inputs, output_final_state=True)
    _, expected = op.operator(*(x[:, 40:] for x in inputs), output_final_state=True)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


@every
def test_step_equals_prefill(op):
    inputs = op.detached(2, op.chunk + 8, 3, 16, 24)
    out, state = op.operator(*inputs, output_final_state=True)
    running = torch.zeros(2, 3, 16, 24)
    storage = running.data_ptr()
    stepped = torch.stack([op.step(*(x[:, t] for x in inputs), running) for t in range(op.chunk + 8)], 1)
    assert running.data_ptr() == storage
    torch.testing.assert_close(stepped, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running, state, rtol=1e-5, atol=1e-5)


@every
def test_step_on_a_strided_state_and_low_precision_inputs(op):
    inputs = [x[:, 0] for x in op.detached(2, 1, 3, 8, dtype=torch.bfloat16)]
    cache = torch.randn(4, 3, 8, 8)
    expected = cache.clone()
    rows = cache[::2]
    out = op.step(*inputs, rows)
    reference, state = op.operator(
        *(x[:, None] for x in inputs), initial_state=expected[::2], output_final_state=True, backend="reference"
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, reference[:, 0])
    torch.testing.assert_close(rows, state)
    torch.testing.assert_close(cache[1::2], expected[1::2])


@every
def test_inputs_need_not_be_contiguous(op):
    inputs, k = op.inputs(2, 70, 2, 8), op.names.index("k")
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    strided[k] = inputs[k].detach()[:, :, :1].expand(-1, -1, 2, -1).requires_grad_()
    inputs[k] = strided[k].detach().clone().requires_grad_()
    whole, other = op.run(inputs), op.run(strided)
    for name in whole:
        torch.testing.assert_close(other[name], whole[name])


@every
@pytest.mark.parametrize("T", [5, 70])
def test_gradient_check(op, T):
    """Of all gradients at once for 70 tokens, over a chunk's edge: fast mode probes random directions."""
    inputs = op.inputs(1, T, 1, 3, 2, dtype=torch.float64)

    def operator(*args):
        return op.operator(*args[:-1], initial_state=args[-1], output_final_state=True)

    arguments = (*inputs, state_like(1, 1, 3, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(operator, arguments, fast_mode=T > 5)


@every
def test_autocast_does_not_reach_inside(op):
    inputs = op.inputs(1, 70, 2, 16)
    out, _ = op.operator(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, _ = op.operator(*inputs)
    torch.testing.assert_close(other, out)


@every
def test_no_final_state_unless_asked_and_frozen_inputs_get_no_gradient(op):
    inputs = op.inputs(1, 8, 1, 8)
    inputs[0] = inputs[0].detach()
    out, state = op.operator(*inputs)
    assert state is None
    out.sum().backward()
    assert inputs[0].grad is None
    assert inputs[1].grad is not None


@every
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"r": x["r"][:, :-1]}, "must have k's shape"),
        (lambda x: {"v": x["v"][:, :, :1]}, "v must be"),
        (lambda x: {"k": x["k"][0]}, "k and v must be"),
        (lambda x: {"log_decay": x["log_decay"].long()}, "log_decay must be bfloat16"),
        (lambda x: {"initial_state": torch.zeros(2, 2, 8, 9)}, "initial_state must be"),
        (lambda x: {"cu_seqlens": torch.tensor([0, 10])}, "batch must be 1"),
        (lambda x: {"backend": "fast"}, "unknown backend 'fast'; choose from reference, chunked, "),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(op, change, message):
    inputs = dict(zip(("r", *op.names[1:]), op.inputs(2, 10, 2, 8), strict=True))
    parameters = dict(zip(inputs, inspect.signature(op.operator).parameters, strict=False))
    arguments = {parameters.get(name, name): x for name, x in (inputs | change(inputs)).items()}
    with pytest.raises(ValueError, match=f"{op.name}: .*{message}") as error:
        op.operator(**arguments)
    assert "\n" not in str(error.value)


@every
@pytest.mark.parametrize("bounds", [[0, 5], [1, 10], [0, 7, 5, 10], [0, 11]])
def test_wrong_boundaries_are_refused(op, bounds):
    with pytest.raises(ValueError, match=f"{op.name}: cu_seqlens must start at 0"):
        op.operator(*op.inputs(1, 10, 1, 8), cu_seqlens=torch.tensor(bounds))


@every
def test_step_refuses_a_state_that_does_not_fit(op):
    inputs = [x[:, 0] for x in op.inputs(1, 1, 2, 8)]
    with pytest.raises(ValueError, match=f"{op.name}_step: v must be"):
        op.step(*inputs, torch.zeros(1, 2, 8, 16))
