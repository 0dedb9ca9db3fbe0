"""linear_kl and linear_ce against the same losses written plainly over whole logits."""

import math

import pytest
import torch
import torch.nn.functional as functional

from radlads.kernels.linear_kl import driver, linear_ce, linear_kl
from radlads.kernels.shared.testing import relative_rms

N, D, E, V = 37, 16, 24, 50
DIVERGENCES = ("forward", "reverse", "jsd")


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Chunks of sixteen tokens: two whole ones and a ragged tail."""
    monkeypatch.setattr(driver, "ARENA_BYTES", {"cpu": 8 * V * 16, "cuda": 8 * V * 16})


def operands(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, D), (V, D), (N, E), (V, E))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * shape[1] ** -0.25 for shape in shapes]
    student, head, teacher, teacher_head = (x.to(dtype) for x in tensors)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    weight = torch.rand(N, generator=generator, dtype=torch.float64)
    weight[3:6] = 0
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels, weight


def plain_kl(
    student, head, teacher, teacher_head, tau, labels, ce_weight, kl_weight, weight, divergence="forward"
):  # fmt: skip
    z, y = student @ head.T, teacher @ teacher_head.T
    weight = torch.ones(N, dtype=z.dtype) if weight is None else weight
    log_q, log_p = (z / tau).log_softmax(-1), (y / tau).log_softmax(-1)

    def mean_kl(of, to):
        kl_n = functional.kl_div(to, of, log_target=True, reduction="none")
        return (kl_n.sum(-1) * weight).sum() / weight.sum() * tau**2

    kl, reverse = mean_kl(log_p, log_q), mean_kl(log_q, log_p)
    counted = (labels != -100) * weight
    ce = (functional.cross_entropy(z, labels, reduction="none") * counted).sum() / counted.sum()
    same = ((z.argmax(-1) == y.argmax(-1)) * weight).sum() / weight.sum()
    metrics = {"kl": kl, "ce": ce, "top1_agreement": same}
    if divergence == "forward":
        return kl_weight * kl + ce_weight * ce, metrics
    if divergence == "reverse":
        return kl_weight * reverse + ce_weight * ce, {**metrics, "reverse_kl": reverse}
    log_m = torch.stack([log_p, log_q]).logsumexp(0) - math.log(2)
    jsd = (mean_kl(log_p, log_m) + mean_kl(log_q, log_m)) / 2
    return kl_weight * jsd + ce_weight * ce, {**metrics, "jsd": jsd}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("tau", "ce_weight", "kl_weight"), [(1.0, 0.0, 1.0), (2.0, 0.3, 0.7), (0.5, 1.0, 0.0), (1.0, 0.5, 1.0)]
)
def test_kl_equals_the_plain_loss(tau, ce_weight, kl_weight, weighted, divergence):
    student, head, teacher, teacher_head, labels, weight = operands()
    weight = weight if weighted else None
    loss, metrics = linear_kl(
        student, head, teacher, teacher_head,
        temperature=tau, labels_N=labels, ce_weight=ce_weight, kl_weight=kl_weight, weight_N=weight,
        divergence=divergence,
    )  # fmt: skip
    plain, expected = plain_kl(
        student, head, teacher, teacher_head, tau, labels, ce_weight, kl_weight, weight, divergence
    )
    torch.testing.assert_close(loss, plain)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach().to(metrics[name].dtype))
        assert not metrics[name].requires_grad
    ours = torch.autograd.grad(loss, (student, head))
    for grad, reference in zip(ours, torch.autograd.grad(plain, (student, head)), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_have_no_divergence_and_no_gradient(divergence):
    student, head, *_ = operands()
    loss, metrics = linear_kl(student, head, student.detach(), head.detach(), temperature=2.0, divergence=divergence)
    assert loss.abs() < 1e-14
    assert metrics["top1_agreement"] == 1
    assert metrics["ce"] == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-14


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ce_equals_torch(smoothing):
    student, head, _, _, labels, _ = operands()
    loss, metrics = linear_ce(student, head, labels, label_smoothing=smoothing)
    logits = student @ head.T
    plain = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(metrics["ce"], functional.cross_entropy(logits, labels).detach())
    counted = labels != -100
    assert metrics["num_tokens"] == counted.sum()
    torch.testing.assert_close(metrics["accuracy"], (logits.argmax(-1) == labels)[counted].double().mean())
    ours = torch.autograd.grad(loss, (student, head))
    for grad, reference in zip(ours, torch.autograd.grad(plain, (student, head)), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_plain(dtype, divergence):
    """Against fp64 on the same rounded operands: never worse than twice the plain loss in that dtype."""
    student, head, teacher, teacher_head, labels, _ = operands(dtype)
    arguments = (1.0, labels, 0.5, 1.0, None, divergence)
    wide = [x.detach().double().requires_grad_() for x in (student, head)]
    exact, _ = plain_kl(*wide, teacher.double(), teacher_head.double(), *arguments)
    exact_grads = torch.autograd.grad(exact, wide)
    plain, _ = plain_kl(student, head, teacher, teacher_head, *arguments)
    plain_grads = torch.autograd.grad(plain, (student, head))
    loss, _ = linear_kl(student, head, teacher, teacher_head, labels_N=labels, ce_weight=0.5, divergence=divergence)
    grads = torch.autograd.grad(loss, (student, head))
    assert loss.dtype == torch.float32
    pairs = [(loss, plain, exact), *zip(grads, plain_grads, exact_grads, strict=True)]
    for ours, theirs, reference in pairs:
        assert relative_rms(ours, reference) <= 2 * relative_rms(theirs, reference) + 1e-6
    assert all(grad.dtype == dtype for grad in grads)


def test_small_fp16_gradients_survive_loss_scaling():
    student, head, teacher, teacher_head, *_ = operands(torch.float16)
    loss, _ = linear_kl(student, head, teacher, teacher_head)
    (grad,) = torch.autograd.grad(loss * 1e-3 * 2**16, student, retain_graph=True)
    (plain,) = torch.autograd.grad(loss * 1e-3 * 2**4, student)
    torch.testing.assert_close(grad.float(), plain.float() * 2**12, rtol=1e-2, atol=1e-2)


def test_gradients_only_where_asked():
    student, head, teacher, teacher_head, labels, _ = operands()
    linear_kl(student, head.detach(), teacher, teacher_head)[0].backward()
    assert student.grad is not None
    student.grad = None
    linear_ce(student.detach(), head, labels)[0].backward()
    assert head.grad is not None
    assert student.grad is None
    with torch.no_grad():
        loss, _ = linear_kl(student, head, teacher, teacher_head)
        assert not loss.requires_grad
        assert not linear_ce(student, head, labels)[0].requires_grad
    assert not linear_kl(student.detach(), head.detach(), teacher, teacher_head)[0].requires_grad


def test_upstream_gradient_scales_and_backward_can_be_repeated():
    student, head, _, _, labels, _ = operands()
    loss, _ = linear_ce(student, head, labels)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (thrice,) = torch.autograd.grad(loss * 3, student)
    torch.testing.assert_close(thrice, once * 3)


def test_no_tokens_give_zero_not_nan():
    student, head, teacher, teacher_head, labels, weight = operands()
    loss, metrics = linear_ce(student, head, torch.full_like(labels, -100))
    assert loss == 0
    assert metrics["num_tokens"] == 0
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.abs().max() == 0
    loss, metrics = linear_kl(student, head, teacher, teacher_head, weight_N=weight * 0, labels_N=labels, ce_weight=1.0)
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_finite(divergence):
    student, head, teacher, teacher_head, labels, _ = operands(torch.float32)
    loss, _ = linear_kl(
        student * 1e3, head, teacher * 1e3, teacher_head, labels_N=labels, ce_weight=1.0, divergence=divergence
    )
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_check(divergence):
    student, head, teacher, teacher_head, labels, weight = operands()
    student, head = student.detach()[:5, :3].requires_grad_(), head.detach()[:7, :3].requires_grad_()
    teacher, teacher_head, labels, weight = teacher[:5], teacher_head[:7], labels[:5] % 7, weight[:5]

    def loss(x, y):
        return linear_kl(
            x, y, teacher, teacher_head,
            temperature=1.5, labels_N=labels, ce_weight=0.4, weight_N=weight, divergence=divergence,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student, head))


def test_autocast_casts_as_linear_does():
    student, head, _, _, labels, _ = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_ce(student, head, labels)
    rounded, _ = linear_ce(student.bfloat16(), head.bfloat16(), labels)
    assert loss == rounded
    assert torch.autograd.grad(loss, student)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_incoming_scalar_is_not_rounded(dtype):
    student, head, teacher, teacher_head, labels, _ = operands(dtype)
    for loss, _ in (linear_ce(student, head, labels), linear_kl(student, head, teacher, teacher_head)):
        whole = torch.autograd.grad(loss, (student, head), retain_graph=True)
        third = torch.autograd.grad(loss / 3, (student, head))
        for one, grad in zip(whole, third, strict=True):
            # whole was rounded once itself, where its gradient waited in a wider precision
            torch.testing.assert_close(grad.double(), one.double() / 3, rtol=torch.finfo(dtype).eps * 1.01, atol=1e-7)
            mean = (grad.double() * one.double()).sum() / one.double().square().sum()
            assert mean == pytest.approx(1 / 3, rel=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_head_VD": torch.zeros(V, D + 1)}, "student hidden"),
        ({"teacher_head_VE": torch.zeros(V + 1, E)}, "differ in tokens or vocabulary"),
        ({"labels_N": torch.zeros(3, dtype=torch.long)}, "labels_N must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"ce_weight": 1.0}, "ce_weight needs labels_N"),
        ({"divergence": "backward"}, "divergence must be one of forward, reverse, jsd, got 'backward'"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "jsd_beta must lie between 0.001 and 0.999"),
        ({"divergence": "jsd", "jsd_beta": 1e-9}, "jsd_beta must lie between 0.001 and 0.999"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    student, head, teacher, teacher_head, *_ = operands(torch.float32)
    names = ("student_hidden_ND", "student_head_VD", "teacher_hidden_NE", "teacher_head_VE")
    with pytest.raises(ValueError, match=message):
        linear_kl(**(dict(zip(names, (student, head, teacher, teacher_head), strict=True)) | change))


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_a_temperature_of_the_teacher_alone_is_another_target(ce_weight):
    student, head, teacher, teacher_head, labels, weight = operands(seed=3)
    options = {"labels_N": labels, "ce_weight": ce_weight, "weight_N": weight}
    loss, metrics = linear_kl(student, head, teacher, teacher_head, teacher_temperature=1.7, **options)
    plain, expected = plain_kl(student, head, teacher / 1.7, teacher_head, 1.0, labels, ce_weight, 1.0, weight)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(metrics["kl"], expected["kl"].detach())
    for grad, reference in zip(
        torch.autograd.grad(loss, (student, head)), torch.autograd.grad(plain, (student, head)), strict=True
    ):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_temperature_for_each_side(divergence):
    """Between softmax(y / τ_t) and softmax(z / τ_s), times the square of the student's."""
    student, head, teacher, teacher_head, labels, _ = operands(seed=3)
    both = {"student_temperature": 2.0, "teacher_temperature": 0.7, "divergence": divergence}
    loss, metrics = linear_kl(student, head, teacher, teacher_head, labels_N=labels, ce_weight=0.3, **both)
    plain, expected = plain_kl(
        student, head, teacher * (2 / 0.7), teacher_head, 2.0, labels, 0.3, 1.0, None, divergence
    )
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(metrics["kl"], expected["kl"].detach())
    ours = torch.autograd.grad(loss, (student, head))
    for grad, reference in zip(ours, torch.autograd.grad(plain, (student, head)), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-14)
    same, _ = linear_kl(student, head, teacher, teacher_head, student_temperature=1.5, teacher_temperature=1.5)
    torch.testing.assert_close(same, linear_kl(student, head, teacher, teacher_head, temperature=1.5)[0])


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_the_mixture_has_beta_of_the_teacher(beta):
    student, head, teacher, teacher_head, *_ = operands()
    loss, metrics = linear_kl(student, head, teacher, teacher_head, divergence="jsd", jsd_beta=beta)
    q, p = ((x @ w.T).softmax(-1) for x, w in ((student, head), (teacher, teacher_head)))
    m = beta * p + (1 - beta) * q
    plain = (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1).mean()
    torch.testing.assert_close(loss, plain)
    assert metrics["jsd"] == loss
    ours = torch.autograd.grad(loss, (student, head))
    for grad, reference in zip(ours, torch.autograd.grad(plain, (student, head)), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("beta", [0.001, 0.999])
def test_the_ends_of_beta_are_finite_where_distributions_exclude_each_other(beta):
    student, head, teacher, teacher_head, *_ = operands(torch.float32)
    student, head, teacher = (10 * x for x in (student, head, teacher))
    student, head = (x.detach().requires_grad_() for x in (student, head))
    loss, _ = linear_kl(student, head, teacher, teacher_head, divergence="jsd", jsd_beta=beta)
    grads = torch.autograd.grad(loss, (student, head))
    assert 0 <= loss <= 0.04  # the entropy of β and 1 - β is the most
    assert all(grad.isfinite().all() for grad in grads)
    wide, _ = linear_kl(
        *(x.double() for x in (student, head, teacher, teacher_head)), divergence="jsd", jsd_beta=beta
    )  # fmt: skip
    assert loss.item() == pytest.approx(wide.item(), rel=1e-4)


def test_a_product_that_lacks_the_teachers_logits_is_not_chosen_for_reverse_kl(monkeypatch):
    """On a GPU where the fused products would run otherwise."""
    student, head, teacher, teacher_head, *_ = operands(torch.float32)

    def fused(*_):
        raise AssertionError("chosen")

    expected = linear_kl(student, head, teacher, teacher_head, divergence="reverse")[0]
    monkeypatch.setattr(driver, "choose_products", lambda batch: (fused, fused))
    with pytest.raises(AssertionError, match="chosen"):
        linear_kl(student, head, teacher, teacher_head)
    assert linear_kl(student, head, teacher, teacher_head, divergence="reverse")[0] == expected


@pytest.mark.parametrize("budget", [2 * V * 16, 8 * V * 50, 8 * V * 700])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_cut_into_tiles_and_blocks_does_not_matter(monkeypatch, budget, dtype):
    student, head, teacher, teacher_head, labels, _ = operands(dtype)
    expected = linear_kl(student, head, teacher, teacher_head, labels_N=labels, ce_weight=0.3)
    grads = torch.autograd.grad(expected[0], (student, head))
    monkeypatch.setattr(driver, "ARENA_BYTES", {"cpu": budget})
    found = linear_kl(student, head, teacher, teacher_head, labels_N=labels, ce_weight=0.3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found[0], (student, head)), grads)


@pytest.mark.parametrize("logits", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grad", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 300, 5000])
def test_tiles_fit_the_memory_and_do_not_overlap(monkeypatch, num_tokens, powers, alone, grad, logits):
    vocabulary = 48
    budget = 1500 * 4 * vocabulary
    monkeypatch.setattr(driver, "ARENA_BYTES", {"cpu": budget})
    tiles = driver._Tiles(num_tokens, vocabulary, torch.device("cpu"), logits, grad, alone, 1024, powers)
    assert sum(map(sum, tiles.blocks)) == num_tokens
    assert tiles.arena.numel() <= budget
    assert max(map(sum, tiles.blocks)) <= 1024
    if powers:
        whole = [count for block in tiles.blocks[:-1] for count in block]
        assert all(count >= 128 and count.bit_count() == 1 for count in whole)
    for block in tiles.blocks:
        done = 0
        for count in block:
            z, y, gradients = tiles.views(done, count)
            if done:
                tiles.gradients(done).fill_(7)
            for value, x in enumerate((z, y)):
                if x is not None:
                    x.fill_(value)
            assert (z == 0).all()
            if gradients is not None and gradients.dtype != z.dtype:
                gradients.fill_(5)
                assert (z == 0).all()
            assert y is None or (y == 1).all()
            if done:
                assert (tiles.gradients(done) == 7).all()
            done += count


def test_bf16_logits_are_those_of_a_plain_head():
    student, head, teacher, teacher_head, labels, _ = operands(torch.bfloat16)
    loss, _ = linear_kl(
        student, head, teacher, teacher_head, labels_N=labels, ce_weight=0.5, logits_dtype=torch.bfloat16
    )
    z, y = (student @ head.T).float(), (teacher @ teacher_head.T).float()
    plain = functional.kl_div(z.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="batchmean")
    plain = plain + 0.5 * functional.cross_entropy(z, labels)
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_l2wrap_adds_to_the_gradient_of_the_largest_logits_and_not_to_the_loss(tau, ce_weight):
    student, head, teacher, teacher_head, labels, _ = operands(seed=4)
    options = {"temperature": tau, "labels_N": labels, "ce_weight": ce_weight}
    loss, _ = linear_kl(student, head, teacher, teacher_head, l2wrap=0.1, **options)
    plain, _ = plain_kl(student, head, teacher, teacher_head, tau, labels, ce_weight, 1.0, None)
    torch.testing.assert_close(loss, plain)
    wrapped = plain + 0.1 * (student @ head.T).max(-1).values.square().mean() / 2
    for grad, reference in zip(
        torch.autograd.grad(loss, (student, head)), torch.autograd.grad(wrapped, (student, head)), strict=True
    ):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-14)
