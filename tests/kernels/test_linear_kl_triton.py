"""The fused kernel of linear_kl and linear_ce: interpreted on the CPU, compiled for GPUs that are not here, run on one
that is."""

import math

import pytest
import torch
import torch.nn.functional as functional

from radlads.kernels.linear_kl import linear_ce, linear_kl
from radlads.kernels.shared.backends import is_hopper
from radlads.kernels.shared.testing import relative_rms

pytest.importorskip("triton")


@pytest.mark.slow
def test_interpreted(interpret):
    interpret("interpreter_rows.py")


@pytest.mark.slow
@pytest.mark.parametrize("V", [100, 152064])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles(target, V, compiler):
    code = f"from radlads.kernels.shared.offline import compile_rows; assert len(compile_rows('{target}', {V})) == 4"
    compiler(code)


@pytest.mark.slow
@pytest.mark.parametrize("V", [100, 152064])
@pytest.mark.parametrize("tempered", [True, False])
def test_the_products_compile(V, tempered, compiler):
    """By wgmma, within the shared memory of sm_90."""
    code = (
        "from radlads.kernels.shared.offline import compile_products\n"
        f"made = compile_products({V}, tempered={tempered})\n"
        "products = [made[name] for name in ('teacher', 'student', 'alone', 'outer')]\n"
        "assert all('wgmma.mma_async' in x.asm['ptx'] and x.metadata.shared <= 232448 for x in products)"
    )
    compiler(code)


def test_what_the_products_take():
    from radlads.kernels.linear_kl.triton_product import takes

    hidden, head = torch.zeros(6, 32).bfloat16(), torch.zeros(40, 32).bfloat16()
    assert takes(hidden, head)
    assert takes(hidden[2:], head[:7])
    assert takes(hidden[:, :24], head[:, :24])
    refused = {
        "a width of no multiple of 16 bytes, in rows that are one": (hidden[:, :20], head[:, :20]),
        "not aligned": (hidden[:, 4:28], head[:, 4:28]),
        "one row for all": (hidden[:1].expand(6, 32), head),
        "columns first": (torch.zeros(32, 8).bfloat16().T, head),
        "two dtypes": (hidden.half(), head),
        "32 bits": (hidden.float(), head.float()),
        "nothing": (hidden[:, :0], head[:, :0]),
    }
    for why, pair in refused.items():
        assert not takes(*pair), why


@pytest.mark.gpu
@pytest.mark.parametrize("logits", [None, torch.float32])
@pytest.mark.parametrize("V", [1000, 50257, 152064])
@pytest.mark.parametrize("tau", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_on_the_gpu(V, tau, logits, divergence):
    """Rows of one part to 75, an odd vocabulary, several tiles; logits in memory, and (on Hopper) never."""
    generator = torch.Generator("cuda").manual_seed(0)
    N, D = 2500, 72
    hidden, teacher = (torch.randn(N, D, device="cuda", generator=generator).bfloat16() for _ in range(2))
    head, other = (torch.randn(V, D, device="cuda", generator=generator).mul(0.3).bfloat16() for _ in range(2))
    labels = torch.randint(0, V, (N,), device="cuda", generator=generator)
    labels[::7] = -100
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    kl, metrics = linear_kl(
        hidden, head, teacher, other, temperature=tau, labels_N=labels, ce_weight=0.5, logits_dtype=logits,
        divergence=divergence,
    )  # fmt: skip
    ce, _ = linear_ce(hidden, head, labels, label_smoothing=0.1, logits_dtype=logits)
    ours = torch.autograd.grad(kl + ce, leaves)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    z, y = wide[0] @ wide[1].t(), teacher.float() @ other.float().t()
    q, p = (z / tau).log_softmax(-1), (y / tau).log_softmax(-1)
    forward = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    reverse = functional.kl_div(p, q, log_target=True, reduction="batchmean")
    m = torch.stack([q, p]).logsumexp(0) - math.log(2)
    mixed = sum(functional.kl_div(m, x, log_target=True, reduction="batchmean") for x in (p, q)) / 2
    trained = {"forward": forward, "reverse": reverse, "jsd": mixed}[divergence]
    plain = trained * tau**2 + 0.5 * functional.cross_entropy(z, labels)
    plain = plain + functional.cross_entropy(z, labels, label_smoothing=0.1)
    torch.testing.assert_close(metrics["kl"], forward.detach() * tau**2, rtol=1e-4, atol=1e-5)
    name = {"forward": "kl", "reverse": "reverse_kl", "jsd": "jsd"}[divergence]
    torch.testing.assert_close(metrics[name], trained.detach() * tau**2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((kl + ce).detach(), plain.detach(), rtol=1e-4, atol=1e-5)
    agreement = (z.argmax(-1) == y.argmax(-1)).float().mean()
    assert (metrics["top1_agreement"] - agreement).abs() < 0.01
    for x, y in zip(ours, torch.autograd.grad(plain, wide), strict=True):
        assert relative_rms(x, y) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_as_good_as_logits_in_memory_on_the_gpu(dtype):
    """Against fp64, near the teacher, where a gradient is a small difference; equal models have none but rounding."""
    if not is_hopper():
        pytest.skip("for NVIDIA's Hopper")
    generator = torch.Generator("cuda").manual_seed(0)
    N, D, V = 600, 256, 33000
    hidden = torch.randn(N, D, device="cuda", generator=generator).to(dtype)
    head = torch.randn(V, D, device="cuda", generator=generator).mul(2.5 * D**-0.5).to(dtype)
    near = (head + head.abs().mean() * 0.05 * torch.randn(V, D, device="cuda", generator=generator)).to(dtype)
    leaves = [hidden.requires_grad_(), near.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    q, p = ((wide[0] @ x.t()).log_softmax(-1) for x in (wide[1], head.double()))
    plain = functional.kl_div(q, p.detach(), log_target=True, reduction="batchmean")
    exact = torch.autograd.grad(plain, wide)
    errors = {}
    for logits in (None, torch.float32):
        kl, _ = linear_kl(hidden, near, hidden.detach(), head, logits_dtype=logits)
        torch.testing.assert_close(kl.double(), plain, rtol=2e-3, atol=0)
        errors[logits] = [relative_rms(x, y) for x, y in zip(torch.autograd.grad(kl, leaves), exact, strict=True)]
    for ours, baseline in zip(errors[None], errors[torch.float32], strict=True):
        assert ours < 1.3 * baseline
    kl, metrics = linear_kl(hidden, head, hidden.detach(), head, temperature=1.5)
    assert kl.abs() < 1e-6
    assert metrics["top1_agreement"] == 1
    assert torch.autograd.grad(kl, hidden)[0].abs().max() < 1e-6 * exact[0].abs().max()
