"""The Triton kernel of linear_kl in Triton's interpreter, on the CPU, beside plain torch. Run by
test_linear_kl_triton.py in a process of its own: Triton decides when a kernel is defined whether it is interpreted."""

from functools import partial

import pytest
import torch
import triton

from radlads.kernels.linear_kl import driver, linear_ce, linear_kl, triton_rows
from radlads.kernels.linear_kl.rows import RowLosses, RowSettings, torch_rows

assert triton.knobs.runtime.interpret, "run through test_linear_kl_triton.py"
ROWS = 7
RUNS = {  # whole rows, and rows of five parts or so by one program, which writes a row's gradients after all its facts
    "whole": triton_rows.triton_rows,
    "parts": partial(triton_rows.triton_rows, block=16),
    "lagging": partial(triton_rows.triton_rows, block=32, lag=5),
}
SETTINGS = {
    "kl": RowSettings(kl_factor=0.7),
    "tempered": RowSettings(2.0, 0.5, kl_factor=1.3, l2wrap=0.1),
    "smoothed": RowSettings(smoothing=0.2),
}


@pytest.fixture(params=RUNS)
def run_rows(request):
    return RUNS[request.param]


def logits(V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, y = (torch.randn(ROWS, V, generator=generator) * 4 for _ in range(2))
    labels = torch.randint(0, V, (ROWS,), generator=generator)
    labels[2] = -100
    y[3] = z[3]
    return z, y, labels, torch.rand(ROWS, generator=generator) * (labels >= 0)


def empty_losses():
    return RowLosses(*(torch.zeros(ROWS) for _ in RowLosses._fields))


def assert_same(found, expected, grad, expected_grad):
    for name, x, y in zip(RowLosses._fields, found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(grad, expected_grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("V", [64, 77])
def test_kernel_equals_torch(run_rows, V, name, teacher, labelled):
    z, y, labels, factors = logits(V)
    y, labels = y if teacher else None, labels if labelled else None
    factors = factors if labelled else None
    expected, expected_grad = empty_losses(), torch.empty(ROWS, V)
    torch_rows(z.clone(), y if y is None else y.clone(), labels, factors, expected_grad, SETTINGS[name], expected)
    found, grad = empty_losses(), torch.full((ROWS, V + 3), 9.0)
    strided = None if labels is None else labels.repeat_interleave(2)[::2]
    run_rows(z, y, strided, factors, grad[:, :V], SETTINGS[name], found)
    assert_same(found, expected, grad[:, :V], expected_grad)
    assert (grad[:, V:] == 9).all()
    run_rows(z, y, labels, factors, z, SETTINGS[name], found)
    torch.testing.assert_close(z, expected_grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("programs", [3, 11])
@pytest.mark.parametrize("name", SETTINGS)
def test_programs_share_the_parts(name, programs):
    """Without a gradient nobody waits, so the interpreter can run program after program; then with one, all known."""
    V, block = 77, 16
    z, y, labels, factors = logits(V)
    settings = SETTINGS[name]
    expected, expected_grad = empty_losses(), torch.empty(ROWS, V)
    torch_rows(z.clone(), y.clone(), labels, factors, expected_grad, settings, expected)
    found, grad = empty_losses(), torch.empty(ROWS, V)
    parts = -(-V // block)
    facts, results = torch.full((ROWS * parts * 9,), float("nan")), torch.full((ROWS * 6,), float("nan"))
    arrived = torch.zeros(ROWS, dtype=torch.int32)
    for with_gradient in (False, True):
        triton_rows.rows_kernel[(programs,)](
            z, y, labels, factors, grad, *found, facts, results, arrived, ROWS * parts, V, V, V, V,
            1 / settings.student_temperature, 1 / settings.teacher_temperature, settings.kl_factor,
            settings.smoothing, settings.l2wrap, settings.ignore_index, PARTS=parts, POWER=8, BLOCK=block,
            LAG=-(-parts // programs), TEACHER=True, LABELS=True, FACTORS=True, GRAD=with_gradient,
            TEMPERED=settings.student_temperature != 1, SMOOTH=settings.smoothing != 0, WRAP=settings.l2wrap != 0,
        )  # fmt: skip
        assert (arrived == parts + 1 + parts * with_gradient).all()
    assert_same(found, expected, grad, expected_grad)


def test_equal_logits_have_exactly_no_divergence(run_rows):
    z, y, *_ = logits(50)
    found, grad = empty_losses(), torch.empty(ROWS, 50)
    run_rows(z, y, None, None, grad, RowSettings(kl_factor=1.0), found)
    assert found.kl[3] == 0
    assert (grad[3] == 0).all()
    assert found.same[3] == 1


def test_a_label_outside_the_vocabulary_shows(run_rows):
    z, _, labels, factors = logits(50)
    labels[0] = 50
    found = empty_losses()
    run_rows(z, None, labels, factors, None, RowSettings(), found)
    assert found.nll[0].isnan()
    assert found.nll[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_losses(monkeypatch, run_rows, dtype):
    generator = torch.Generator().manual_seed(1)
    hidden, teacher, head = (torch.randn(n, 16, generator=generator).to(dtype) for n in (37, 37, 60))
    hidden.requires_grad_()
    labels = torch.randint(0, 60, (37,), generator=generator)

    def both():
        kl, metrics = linear_kl(hidden, head, teacher, head, temperature=2.0, labels_N=labels, ce_weight=0.5)
        ce, others = linear_ce(hidden, head, labels, label_smoothing=0.1)
        return [kl, *metrics.values(), ce, *others.values(), *torch.autograd.grad(kl + ce, hidden)]

    expected = both()
    monkeypatch.setattr(driver, "choose_rows", lambda device, dtype: run_rows)
    for x, y in zip(both(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
