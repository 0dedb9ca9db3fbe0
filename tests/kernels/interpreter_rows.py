"""The Triton kernel of linear_kl in Triton's interpreter, on the CPU, beside plain torch. Run by
test_linear_kl_triton.py in a process of its own: Triton decides when a kernel is defined whether it is interpreted."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from radlads.kernels.linear_kl import driver, linear_ce, linear_kl, triton_outer, triton_product, triton_rows
from radlads.kernels.linear_kl.rows import RowLosses, RowSettings, torch_rows
from radlads.kernels.shared.testing import relative_rms

assert triton.knobs.runtime.interpret, "run through test_linear_kl_triton.py"
ROWS = 5
RUNS = {  # whole rows, and rows of five parts or so by one program, which writes a row's gradients after all its facts
    "whole": triton_rows.triton_rows,
    "parts": partial(triton_rows.triton_rows, block=16),
    "lagging": partial(triton_rows.triton_rows, block=32, lag=5),
}
# Of the eight combinations four in which any two values meet; with each of RUNS and SETTINGS.
SHAPES = pytest.mark.parametrize(
    ("V", "taught", "labelled"), [(77, True, True), (77, False, False), (64, True, False), (64, False, True)]
)
SETTINGS = {
    "kl": RowSettings(kl_factor=0.7),
    "tempered": RowSettings(2.0, 0.5, kl_factor=1.3, l2wrap=0.1),
    "smoothed": RowSettings(smoothing=0.2),
    "reverse": RowSettings(2.0, 0.5, kl_factor=0.9, l2wrap=0.1, divergence="reverse"),
    "jsd": RowSettings(2.0, 0.5, kl_factor=0.9, l2wrap=0.1, divergence="jsd", jsd_beta=0.2),
}
ONE_KERNEL = [name for name, settings in SETTINGS.items() if settings.divergence != "jsd"]
FORWARD = [name for name, settings in SETTINGS.items() if settings.divergence == "forward"]


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


@SHAPES
@pytest.mark.parametrize("name", SETTINGS)
def test_kernel_equals_torch(run_rows, V, name, taught, labelled):
    z, y, labels, factors = logits(V)
    y, labels = y if taught else None, labels if labelled else None
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
@pytest.mark.parametrize("name", ONE_KERNEL)
def test_programs_share_the_parts(name, programs):
    """Without a gradient nobody waits, so the interpreter can run program after program; then with one, all known."""
    V, block = 77, 16
    z, y, labels, factors = logits(V)
    settings = SETTINGS[name]
    expected, expected_grad = empty_losses(), torch.empty(ROWS, V)
    torch_rows(z.clone(), y.clone(), labels, factors, expected_grad, settings, expected)
    found, grad = empty_losses(), torch.empty(ROWS, V)
    parts = -(-V // block)
    facts, results = (
        torch.full((count,), float("nan"))
        for count in (ROWS * parts * triton_rows.FACTS.value, ROWS * triton_rows.RESULTS.value)
    )
    arrived = torch.zeros(ROWS, dtype=torch.int32)
    for with_gradient in (False, True):
        triton_rows.rows_kernel[(programs,)](
            z, y, labels, factors, grad, *found, facts, results, arrived, ROWS * parts, V, V, V, V,
            1 / settings.student_temperature, 1 / settings.teacher_temperature, settings.kl_factor,
            settings.smoothing, settings.l2wrap, settings.ignore_index, PARTS=parts, POWER=8, BLOCK=block,
            LAG=-(-parts // programs), TEACHER=True, LABELS=True, FACTORS=True, GRAD=with_gradient,
            TEMPERED=settings.student_temperature != 1, SMOOTH=settings.smoothing != 0, WRAP=settings.l2wrap != 0,
            REVERSE=settings.divergence == "reverse",
        )  # fmt: skip
        assert (arrived == parts + 1 + parts * with_gradient).all()
    assert_same(found, expected, grad, expected_grad)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_equal_logits_have_exactly_no_divergence(run_rows, divergence):
    z, y, *_ = logits(50)
    found, grad = empty_losses(), torch.empty(ROWS, 50)
    run_rows(z, y, None, None, grad, RowSettings(kl_factor=1.0, divergence=divergence), found)
    assert found.kl[3] == found.trained[3] == 0
    assert (grad[3] == 0).all()
    assert found.same[3] == 1


def test_a_label_outside_the_vocabulary_shows(run_rows):
    z, _, labels, factors = logits(50)
    labels[0] = 50
    found = empty_losses()
    run_rows(z, None, labels, factors, None, RowSettings(), found)
    assert found.nll[0].isnan()
    assert found.nll[1:].isfinite().all()


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_row_is_as_good_as_in_torch(run_rows, divergence):
    """Against fp64: losses and gradients of fp32 logits, near the teacher, where they are small differences."""
    z, y, *_ = logits(77)
    z = y + 0.01 * z
    settings = RowSettings(1.5, 1.5, kl_factor=1.0, divergence=divergence)
    exact, exact_grad = RowLosses(*(x.double() for x in empty_losses())), torch.empty(ROWS, 77).double()
    torch_rows(z.double(), y.double(), None, None, exact_grad, settings, exact)
    errors = []
    for rows in (torch_rows, run_rows):
        found, grad = empty_losses(), torch.empty(ROWS, 77)
        rows(z.clone(), y.clone(), None, None, grad, settings, found)
        pairs = ((grad, exact_grad), (found.kl, exact.kl), (found.trained, exact.trained))
        errors.append([relative_rms(x, wanted) for x, wanted in pairs if wanted.any()])
    for baseline, ours in zip(*errors, strict=True):
        assert ours <= 2 * baseline + 1e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_losses(monkeypatch, run_rows, dtype, divergence):
    generator = torch.Generator().manual_seed(1)
    hidden, teacher, head = (torch.randn(n, 16, generator=generator).to(dtype) for n in (11, 11, 60))
    hidden.requires_grad_()
    labels = torch.randint(0, 60, (11,), generator=generator)

    def both():
        kl, metrics = linear_kl(
            hidden, head, teacher, head, temperature=2.0, labels_N=labels, ce_weight=0.5, divergence=divergence
        )
        ce, others = linear_ce(hidden, head, labels, label_smoothing=0.1)
        return [kl, *metrics.values(), ce, *others.values(), *torch.autograd.grad(kl + ce, hidden)]

    expected = both()
    monkeypatch.setattr(driver, "choose_rows", lambda device, dtype: run_rows)
    for x, y in zip(both(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# The product that sums its own rows: exponentials wait in fp16, so beside fp32 logits all is right to about 2^-12.
# Operands in fp16, because the interpreter does not multiply bf16 that comes by a descriptor.


@triton.jit
def send(total, row, column, z, BEGUN: tl.constexpr):
    """As the kernel's, whose reduction the interpreter does not know."""
    if BEGUN:
        z += total.load([row, column])
    total.store([row, column], z)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(triton_outer, "_send", send)
    for name, size in {"TOKENS": 16, "PART": 32, "DEPTH": 16, "_GRADIENT_PARTS": 2}.items():
        monkeypatch.setattr(triton_product, name, size)
    for name, size in {"ROWS": 16, "COLUMNS": 16, "DEPTH": 16}.items():
        monkeypatch.setattr(triton_outer, name, size)


def operands(V, dtype=torch.float16, rows=21, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher, head, other = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, rows, V, V))
    teacher[3], labels = hidden[3], torch.randint(0, V, (rows,), generator=generator)
    labels[2] = -100
    return hidden, head, teacher, other, labels, torch.rand(rows, generator=generator) * (labels >= 0)


def empty_product(rows, V, dtype, *, teacher=True):
    """Poisoned memory for student and teacher, in whole parts, and for the gradient in the student's."""
    width = -(-V // triton_product.PART) * triton_product.PART
    ours, theirs = (torch.full((rows, width), 9.0, dtype=torch.float16)[:, :V] for _ in range(2))
    losses = RowLosses(*(torch.full((rows,), float("nan")) for _ in RowLosses._fields))
    return ours, theirs if teacher else None, ours.view(dtype), losses


@SHAPES
@pytest.mark.parametrize("name", [*FORWARD, "cold"])
def test_product_equals_torch(small_parts, V, name, taught, labelled):
    settings = RowSettings(0.6, 1.5, kl_factor=0.8) if name == "cold" else SETTINGS[name]
    if not taught:
        settings = settings._replace(student_temperature=1.0)
    hidden, head, teacher, other, labels, factors = operands(V)
    teacher, other = (teacher, other) if taught else (None, None)
    labels, factors = (labels.repeat_interleave(2)[::2], factors) if labelled else (None, None)
    z = hidden.float() @ head.float().T
    y = None if teacher is None else teacher.float() @ other.float().T
    expected = RowLosses(*(torch.zeros(len(z)) for _ in RowLosses._fields))
    exact = torch.empty_like(z)
    torch_rows(z, y, labels, factors, exact, settings, expected)
    ours, theirs, grad, found = empty_product(len(z), V, hidden.dtype, teacher=taught)
    triton_product.product_rows(hidden, head, teacher, other, labels, factors, ours, theirs, grad, settings, found)
    for field in RowLosses._fields:
        wanted = {"kl": taught, "nll": labelled, "same": taught or labelled, "smooth": labelled and settings.smoothing}
        if wanted.get(field):
            x, y = getattr(found, field), getattr(expected, field)
            torch.testing.assert_close(x, y, rtol=5e-4, atol=5e-4, msg=lambda text, field=field: f"{field}: {text}")
    rounding = relative_rms(exact.to(grad.dtype), exact)
    assert relative_rms(grad, exact) <= 1.5 * rounding
    assert (ours._base[:, V:] == 9).all()
    without = found._replace(**{field: torch.full_like(x, float("nan")) for field, x in found._asdict().items()})
    triton_product.product_rows(hidden, head, teacher, other, labels, factors, ours, theirs, None, settings, without)
    for x, y in zip(without, found, strict=True):
        assert torch.equal(x, y) or (x.isnan().all() and y.isnan().all())


def test_the_product_refuses_reverse_kl(small_parts):
    hidden, head, teacher, other, *_ = operands(64)
    ours, theirs, grad, found = empty_product(len(hidden), 64, hidden.dtype)
    with pytest.raises(ValueError, match="forward KL alone, not reverse"):
        triton_product.product_rows(
            hidden, head, teacher, other, None, None, ours, theirs, grad, SETTINGS["reverse"], found
        )


def test_equal_models_have_exactly_no_divergence_by_the_product(small_parts):
    hidden, head, *_ = operands(70)
    ours, theirs, grad, found = empty_product(len(hidden), 70, hidden.dtype)
    settings = RowSettings(1.5, 1.5, kl_factor=1.0)
    triton_product.product_rows(hidden, head, hidden, head, None, None, ours, theirs, grad, settings, found)
    assert (found.kl == 0).all()
    assert (grad == 0).all()
    assert (found.same == 1).all()


def test_a_token_that_the_student_excludes_has_its_whole_divergence(small_parts):
    """60 below the student's largest: its exponential is 0 in fp16, and KL must count it all the same."""
    V = 64
    hidden, teacher, head = torch.zeros(2, 16), torch.zeros(2, 16), torch.zeros(V, 16)
    hidden[:, 0], teacher[:, 1] = 1, 1
    head[5, 0], head[7, 0], head[7, 1] = 20, -40, 20
    hidden, teacher, head = (x.half() for x in (hidden, teacher, head))
    ours, theirs, grad, found = empty_product(2, V, hidden.dtype)
    triton_product.product_rows(
        hidden, head, teacher, head, None, None, ours, theirs, grad, RowSettings(kl_factor=1.0), found
    )
    q, p = ((x.double() @ head.double().T).log_softmax(-1) for x in (hidden, teacher))
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), q.exp() - p.exp(), rtol=4e-3, atol=1e-7)


def test_a_label_outside_the_vocabulary_shows_by_the_product(small_parts):
    hidden, head, _, _, labels, _ = operands(50)
    labels[0], labels[1] = 50, -1
    ours, _, _, found = empty_product(len(hidden), 50, hidden.dtype)
    triton_product.product_rows(hidden, head, None, None, labels, None, ours, None, None, RowSettings(), found)
    assert found.nll[:2].isnan().all()
    assert found.nll[2:].isfinite().all()


@pytest.mark.parametrize("trained", [True, False])
def test_whole_losses_by_the_product(monkeypatch, small_parts, trained):
    hidden, head, teacher, other, labels, _ = operands(72, rows=40)
    leaves = [hidden.requires_grad_(), head.requires_grad_()] if trained else [hidden.requires_grad_()]

    def both():
        kl, metrics = linear_kl(hidden, head, teacher, other, temperature=2.0, labels_N=labels, ce_weight=0.5)
        ce, others = linear_ce(hidden, head, labels, label_smoothing=0.1)
        grads = torch.autograd.grad(kl + ce, leaves)
        return [kl, *metrics.values(), ce, *others.values()], grads

    expected, exact = both()
    products = triton_product.product_rows, triton_outer.add_outer
    monkeypatch.setattr(driver, "choose_products", lambda batch: products)
    monkeypatch.setattr(driver, "FUSED_BLOCK", {"trained": 32, "frozen": 16})
    found, grads = both()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=5e-4, atol=5e-4)
    for x, y in zip(grads, exact, strict=True):
        assert relative_rms(x, y) < 5e-3


@pytest.mark.parametrize("rows", [16, 37])
def test_the_sum_in_memory(small_parts, rows):
    """Once made over poison, twice added to; a vocabulary and a width that are no multiples of the tiles."""
    generator = torch.Generator().manual_seed(0)
    grad, hidden = (torch.randn(rows, n, generator=generator).half() for n in (48, 24))
    total, beyond = torch.full((40, 24), float("nan")), grad[:, 40:].clone()
    for begun in (False, True, True):
        triton_outer.add_outer(total, grad[:, :40], hidden, begun)
    torch.testing.assert_close(total, 3 * (grad[:, :40].float().T @ hidden.float()), rtol=1e-5, atol=1e-4)
    assert torch.equal(grad[:, 40:], beyond)
