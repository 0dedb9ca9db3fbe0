"""Windowed attention with sinks: against masked attention in fp64, the loop, its states, padding and packed rows."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads.kernels.shared.testing import assert_autograd_rules, poisoned_memory, relative_rms
from radlads.kernels.window_attention import window_attention, window_attention_step

SIZES = [(4, 8), (0, 5), (3, 1), (1, 64), (7, 3)]
SCALE = 0.6


def inputs(B, T, H=4, G=2, K=8, V=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, K), (B, T, G, K), (B, T, G, V)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def masked(q, k, v, sinks, window):
    """All pairs, in the inputs' dtype: what every form is compared with."""
    t = torch.arange(q.shape[1])
    sees = (t[None] <= t[:, None]) & ((t[None] < sinks) | (t[None] > t[:, None] - window))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=sees, scale=SCALE).transpose(1, 2)


def with_gradients(function, args):
    out = function(*args)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, args, upstream)]


def operator(sinks, window, **options):
    return partial(window_attention, sinks=sinks, window=window, scale=SCALE, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 5, 8, 9, 40])
@pytest.mark.parametrize(("sinks", "window"), SIZES)
def test_outputs_and_gradients_are_masked_attentions(sinks, window, T, dtype):
    exact = with_gradients(partial(masked, sinks=sinks, window=window), inputs(2, T, dtype=torch.float64))
    rounded = with_gradients(partial(masked, sinks=sinks, window=window), inputs(2, T, dtype=dtype))
    tiny = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    for backend in ("chunked", "reference"):
        with poisoned_memory():
            found = with_gradients(
                lambda *args, b=backend: operator(sinks, window, backend=b)(*args)[0], inputs(2, T, dtype=dtype)
            )
        for mine, baseline, wanted in zip(found, rounded, exact, strict=True):
            assert mine.dtype == dtype
            assert relative_rms(mine, wanted) <= 2 * relative_rms(baseline, wanted) + tiny


@pytest.mark.parametrize(("sinks", "window"), SIZES)
def test_gradients_are_those_of_finite_differences(sinks, window):
    q, k, v = inputs(1, 7, H=2, G=1, K=2, V=2, dtype=torch.float64)
    _, (memory, seen) = operator(sinks, window)(
        *(x.detach() for x in inputs(1, 6, 2, 1, 2, 2, dtype=torch.float64, seed=1)), output_final_state=True
    )

    def run(q, k, v, memory):
        out, state = operator(sinks, window)(q, k, v, initial_state=(memory, seen), output_final_state=True)
        return out, state[0]

    assert torch.autograd.gradcheck(run, (q, k, v, memory.requires_grad_()), fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(sizes=st.sampled_from(SIZES), cuts=st.lists(st.integers(0, 40), max_size=4), stepped=st.booleans())
def test_read_in_pieces_and_token_by_token(sizes, cuts, stepped):
    sinks, window = sizes
    args = [x.detach() for x in inputs(2, 40)]
    whole, (memory, seen) = operator(*sizes)(*args, output_final_state=True)
    outs, state = [], None
    for start, stop in pairwise(sorted({0, *cuts, 40})):
        piece = [x[:, start:stop] for x in args]
        if stepped and state is not None:
            places = [x.data_ptr() for x in state]
            for t in range(stop - start):
                token = (x[:, t] for x in piece)
                outs.append(window_attention_step(*token, *state, sinks=sinks, window=window, scale=SCALE)[:, None])
            assert places == [x.data_ptr() for x in state]
        else:
            out, state = operator(*sizes)(*piece, initial_state=state, output_final_state=True)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state[0], memory)
    assert torch.equal(state[1], seen)
    assert memory.shape == (2, 2, sinks + window, 14)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("sinks", "window"), SIZES)
def test_padding_anywhere_is_passed_over(sinks, window, backend):
    args = [x.detach() for x in inputs(3, 30)]
    keep = torch.ones(3, 30, dtype=torch.bool)
    keep[0, :11] = False
    keep[1, [2, 3, 9, 20, 29]] = False
    run = operator(sinks, window, backend=backend)
    found, (memory, seen) = run(*args, keep_BT=keep, output_final_state=True)
    assert found.isfinite().all()
    for row in range(3):
        alone, (held, count) = run(*(x[row : row + 1, keep[row]] for x in args), output_final_state=True)
        torch.testing.assert_close(found[row, keep[row]], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(memory[row], held[0])
        assert seen[row] == count[0] == keep[row].sum()
    more = [x.detach() for x in inputs(3, 9, seed=4)]
    following, _ = run(*more, initial_state=(memory, seen))
    row = run(*(torch.cat([x[:1, 11:], y[:1]], 1) for x, y in zip(args, more, strict=True)))[0]
    torch.testing.assert_close(following[:1], row[:, 19:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(("sinks", "window"), SIZES)
@pytest.mark.parametrize("bounds", [[0, 40], [0, 1, 3, 3, 17, 40], [0, 0, 8, 16, 40, 40]])
def test_packed_sequences_are_read_apart(sinks, window, bounds, backend):
    args = inputs(1, 40)
    run = operator(sinks, window, backend=backend)
    packed = with_gradients(lambda *x: run(*x, cu_seqlens=torch.tensor(bounds))[0], args)

    def apart(*args):
        parts = [run(*(x[:, a:b] for x in args))[0] for a, b in pairwise(bounds) if a < b]
        return torch.cat(parts, 1)

    for found, wanted in zip(packed, with_gradients(apart, args), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_block_is_as_long_as_the_window_so_that_work_grows_with_the_tokens():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for T in (256, 512):
        with FlopCounterMode(display=False) as counter:
            operator(4, 16)(*(x.detach() for x in inputs(1, T)))
        counts.append(counter.get_total_flops())
    assert 0 < counts[1] <= 2 * counts[0]


@pytest.mark.parametrize(("sinks", "window"), SIZES)
def test_a_step_of_padding_changes_nothing(sinks, window):
    args = [x.detach() for x in inputs(3, 25)]
    keep = torch.rand(3, 25, generator=torch.Generator().manual_seed(2)) < 0.7
    keep[0, :3] = False
    run = operator(sinks, window)
    expected, (memory, seen) = run(*args, keep_BT=keep, output_final_state=True)
    state = torch.zeros_like(memory), torch.zeros_like(seen)
    sizes = {"sinks": sinks, "window": window, "scale": SCALE}
    for t in range(25):
        out = window_attention_step(*(x[:, t] for x in args), *state, **sizes, keep_B=keep[:, t])
        assert out.isfinite().all()
        torch.testing.assert_close(out[keep[:, t]], expected[keep[:, t], t], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state[0], memory)
    assert torch.equal(state[1], seen)


def test_rules_of_autograd():
    assert_autograd_rules(lambda *args: (operator(3, 8)(*args)[0], None), inputs(1, 40))
    packed = partial(operator(3, 8), cu_seqlens=torch.tensor([0, 3, 3, 17, 40]))
    assert_autograd_rules(lambda *args: (packed(*args)[0], None), inputs(1, 40))


@pytest.mark.parametrize("bounds", [None, [0, 7, 20]])
def test_a_window_beyond_the_row_costs_what_the_row_costs(monkeypatch, bounds):
    """Blocks have no keys that do not exist; the state is as long as the window all the same."""
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **given: (seen.append(k.shape[-2]), plain(q, k, v, **given))[1],
    )
    packed = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    wide, near = (operator(3, window, **packed)(*inputs(1, 20))[0] for window in (5000, 20))
    assert seen == [3 + 20 + 20] * 2
    assert torch.equal(wide, near)
    if bounds is None:
        assert operator(3, 5000, output_final_state=True)(*inputs(1, 20))[1][0].shape[2] == 5003


def test_meta_tells_shapes_alone():
    args = [x.detach().to("meta") for x in inputs(2, 20)]
    out, (memory, seen) = operator(3, 8)(*args, output_final_state=True)
    assert out.shape == (2, 20, 4, 6)
    assert memory.shape == (2, 2, 11, 14)
    assert seen.shape == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window 1 or more"),
        ({"k_BTGK": torch.zeros(2, 10, 3, 8)}, "G a divisor of H"),
        ({"k_BTGK": torch.zeros(2, 10, 2, 8).double()}, "of one dtype"),
        ({"keep_BT": torch.ones(2, 10)}, "keep must be bool"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "needs one row"),
        ({"initial_state": (torch.zeros(2, 2, 5, 14), torch.zeros(2, dtype=torch.long))}, "the state must be"),
        ({"backend": "fast"}, "unknown backend 'fast'; choose from reference, chunked"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change, message):
    names = ("q_BTHK", "k_BTGK", "v_BTGV")
    given = {**dict(zip(names, inputs(2, 10), strict=True)), "sinks": 4, "window": 8, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=f"window_attention: .*{message}") as caught:
        window_attention(**given)
    assert "\n" not in str(caught.value)
