"""Sequences cut into pieces: the same outputs, states and gradients as the operator on the whole, to fp64 rounding."""

from functools import partial

import pytest
import torch

from radlads.kernels.shared.testing import outputs_and_gradients, relative_rms, wkv7_inputs
from radlads.kernels.wkv7 import wkv7
from radlads.kernels.wkv7.chunked import wkv7_chunked
from radlads.kernels.wkv7.split import compose, cut, scan_transitions, wkv7_split


def state_like(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype).mul(0.3).requires_grad_()


def assert_equal_to_the_whole(inputs, state, length, *, allowed=1e-12, **options):
    whole = outputs_and_gradients(wkv7, inputs, state, backend="chunked", **options)
    cut_up = partial(wkv7_split, length=length, operator=wkv7_chunked)
    split = outputs_and_gradients(cut_up, inputs, state, **options)
    for name, reference in whole.items():
        assert split[name].dtype == reference.dtype, name
        assert relative_rms(split[name], reference) <= allowed, name


@pytest.mark.parametrize("length", [1, 7, 16, 50, 1000])
def test_dense(length):
    inputs = wkv7_inputs(2, 50, 2, 8, 12, dtype=torch.float64)
    assert_equal_to_the_whole(inputs, state_like(2, 2, 8, 12), length)


@pytest.mark.parametrize("bounds", [[0, 90], [0, 0, 33, 33, 33, 64, 90, 90], [0, 1, 2, 3, 35, 67, 90]])
@pytest.mark.parametrize("length", [10, 33])
def test_packed(bounds, length):
    inputs = wkv7_inputs(1, 90, 2, 8, 12, dtype=torch.float64)
    state = state_like(len(bounds) - 1, 2, 8, 12)
    assert_equal_to_the_whole(inputs, state, length, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("special", [{"log_decay": 0.0}, {"period": 1, "iclr": 0.98, "log_decay": -1e-3}])
def test_without_decay_and_with_one_key(special):
    """Long memory: what a piece inherits matters to its last token."""
    inputs = wkv7_inputs(1, 128, 1, 8, dtype=torch.float64, **special)
    assert_equal_to_the_whole(inputs, state_like(1, 1, 8, 8), 32)


def test_fp32_is_as_good_as_the_whole():
    inputs = wkv7_inputs(1, 300, 2, 16)
    assert_equal_to_the_whole(inputs, state_like(1, 2, 16, 16, dtype=torch.float32), 50, allowed=5e-6)


def test_low_precision_and_no_initial_state():
    inputs = wkv7_inputs(2, 70, 2, 8, dtype=torch.bfloat16)
    assert_equal_to_the_whole(inputs, None, 20, allowed=2e-3)


def test_gradient_check():
    inputs = wkv7_inputs(1, 4, 1, 2, 1, dtype=torch.float64)

    def operator(*args):
        return wkv7_split(*args[:6], length=3, operator=wkv7_chunked, initial_state=args[6], output_final_state=True)

    assert torch.autograd.gradcheck(operator, (*inputs, state_like(1, 1, 2, 1)))


def test_backward_can_be_repeated_and_no_grad_keeps_nothing():
    inputs = wkv7_inputs(1, 20, 1, 8)
    out, state = wkv7_split(*inputs, length=6, operator=wkv7_chunked)
    assert state is None
    once = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    for x, y in zip(once, torch.autograd.grad(out.sum(), inputs), strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        other, _ = wkv7_split(*inputs, length=6, operator=wkv7_chunked)
    assert not other.requires_grad
    torch.testing.assert_close(other, out)


def test_cut_covers_every_token_once():
    bounds = torch.tensor([0, 0, 5, 12, 12, 30])
    pieces = cut(bounds, 30, 7)
    lengths = pieces.bounds.diff()
    assert lengths.min() >= 0
    assert lengths.max() <= 7
    assert lengths.sum() == 30
    assert pieces.bounds[pieces.first].tolist() == bounds[:-1].tolist()
    assert pieces.bounds[pieces.last + 1].tolist() == bounds[1:].tolist()
    assert pieces.is_first.sum() == pieces.is_last.sum() == 5


@pytest.mark.parametrize("P", [1, 2, 5, 8])
def test_scan_equals_one_after_the_other(P):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(P, 2, 4, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    maps = scan_transitions(A, B)
    whole = A[0], B[0]
    for p in range(P):
        whole = whole if p == 0 else compose((A[p], B[p]), whole)
        torch.testing.assert_close(maps[0][p], whole[0])
        torch.testing.assert_close(maps[1][p], whole[1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_maps_make_sequence_parallelism(ranks):
    """Each rank has a part of the sequence, its own map, and the others' maps; nothing else."""
    inputs = [x.detach() for x in wkv7_inputs(1, 60, 2, 8, dtype=torch.float64)]
    expected, _ = wkv7(*inputs)
    parts = [x.chunk(ranks, 1) for x in inputs]
    eye = torch.eye(8, dtype=torch.float64).expand(1, 2, 8, 8)
    maps = []
    for rank in range(ranks):
        r, w, k, v, a, b = (x[rank] for x in parts)
        _, A = wkv7(r, w, k, torch.zeros_like(v), a, b, initial_state=eye, output_final_state=True)
        _, B = wkv7(r, w, k, v, a, b, output_final_state=True)
        maps.append((A, B))
    _, left = scan_transitions(torch.stack([A for A, _ in maps]), torch.stack([B for _, B in maps]))
    outs = [wkv7(*(x[rank] for x in parts), initial_state=left[rank - 1] if rank else None)[0] for rank in range(ranks)]
    torch.testing.assert_close(torch.cat(outs, 1), expected)


def test_a_length_of_nothing_is_refused():
    with pytest.raises(ValueError, match="length must be at least 1 token"):
        wkv7_split(*wkv7_inputs(1, 4, 1, 8), length=0, operator=wkv7_chunked)
