"""Properties of wkv7 that must hold for any length, split, order and decay."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads.kernels.shared.testing import wkv7_inputs
from radlads.kernels.wkv7 import wkv7

lengths = st.integers(2, 80)
seeds = st.integers(0, 10_000)


def detached(B, T, seed, **options):
    return [x.detach() for x in wkv7_inputs(B, T, 1, 8, seed=seed, **options)]


def assert_close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(T=lengths, seed=seeds, data=st.data())
def test_causal(T, seed, data):
    inputs = detached(1, T, seed)
    t = data.draw(st.integers(1, T - 1))
    out, _ = wkv7(*inputs)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, t:] *= -0.5 if x is not changed[1] else 0.5
    other, _ = wkv7(*changed)
    torch.testing.assert_close(out[:, :t], other[:, :t], rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(T=lengths, seed=seeds, data=st.data())
def test_split_anywhere_and_pass_the_state(T, seed, data):
    inputs = detached(2, T, seed)
    t = data.draw(st.integers(1, T - 1))
    out, state = wkv7(*inputs, output_final_state=True)
    first, carried = wkv7(*(x[:, :t] for x in inputs), output_final_state=True)
    second, last = wkv7(*(x[:, t:] for x in inputs), initial_state=carried, output_final_state=True)
    assert_close(torch.cat([first, second], 1), out)
    assert_close(last, state)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, order=st.permutations(range(4)))
def test_rows_of_a_batch_are_independent(seed, order):
    inputs = detached(4, 35, seed)
    out, _ = wkv7(*inputs)
    other, _ = wkv7(*(x[order] for x in inputs))
    assert_close(other, out[order])


@settings(max_examples=20, deadline=None)
@given(seed=seeds, sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), data=st.data())
def test_packing_order_does_not_matter(seed, sizes, data):
    sizes = [*sizes, 5]
    inputs = detached(1, sum(sizes), seed)
    order = data.draw(st.permutations(range(len(sizes))))

    def bounds(lengths):
        return torch.tensor([0, *lengths]).cumsum(0)

    pieces = [x.split(sizes, 1) for x in inputs]
    out, states = wkv7(*inputs, cu_seqlens=bounds(sizes), output_final_state=True)
    shuffled = [torch.cat([piece[i] for i in order], 1) for piece in pieces]
    other, other_states = wkv7(*shuffled, cu_seqlens=bounds([sizes[i] for i in order]), output_final_state=True)
    assert_close(other, torch.cat([out.split(sizes, 1)[i] for i in order], 1))
    assert_close(other_states, states[order])


@settings(max_examples=20, deadline=None)
@given(T=lengths, log_decay=st.floats(-50, 0), iclr=st.floats(0, 1), period=st.sampled_from([None, 1, 3]))
def test_finite_at_any_decay_and_learning_rate(T, log_decay, iclr, period):
    inputs = wkv7_inputs(1, T, 1, 8, log_decay=log_decay, iclr=iclr, period=period)
    out, state = wkv7(*inputs, output_final_state=True)
    (out.sum() + state.sum()).backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs)
