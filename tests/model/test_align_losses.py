"""The align losses against the same formulas written naively, in fp64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from radlads.model.training.align_losses import (
    ComprehensiveLoss,
    ScaledMse,
    build_align_loss,
    gram_difference_norm,
    l2_loss,
    no_spectrum,
)
from radlads.tasks.contracts.recipe.recipe import Align
from radlads.tasks.contracts.recipe.recipe import Comprehensive as Weights

LAYERS = 10
TERMS = ("content", "cosine", "context", "local", "sequence_mean", "temporal", "spectral")


def outputs(B: int, n: int, D: int, seed: int = 0, distance: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(B, n, D, generator=generator, dtype=torch.float64)
    out = 0.7 * wanted + distance * torch.randn(B, n, D, generator=generator, dtype=torch.float64)
    return out.requires_grad_(), wanted


def naive_terms(S: Tensor, T: Tensor, revision: str) -> dict[str, Tensor]:
    """Of one sequence, token by token where that is how it is defined, with every matrix whole; means of several."""
    B, n, D = S.shape
    if B > 1:
        each = [naive_terms(S[b : b + 1], T[b : b + 1], revision) for b in range(B)]
        return {term: torch.stack([terms[term] for terms in each]).mean() for term in TERMS}
    content, cosine, context, temporal, spectral = [], [], [], [], []
    for b in range(B):
        s = (T[b].abs().mean() / (S[b].abs().mean() + 1e-8)).detach()
        for t in range(n):
            content.append((T[b, t] - s * S[b, t]).square().sum().sqrt() / D**0.5)
            cosine.append(1 - (T[b, t] @ S[b, t]) / (T[b, t].norm() * S[b, t].norm()))
        unit_T, unit_S = T[b] / T[b].norm(dim=-1, keepdim=True), S[b] / S[b].norm(dim=-1, keepdim=True)
        context.append((unit_T @ unit_T.T - unit_S @ unit_S.T).norm() / n**2)
        dT, dS = (T[b, 1:] - T[b, :-1]).flatten(), (S[b, 1:] - S[b, :-1]).flatten()
        temporal.append(1 - dT @ dS / (dT.norm() * dS.norm()))
        spectral.append((T[b].T @ T[b] / n - S[b].T @ S[b] / n).norm() / D)
    c = D // 16
    local = (T.reshape(B, n, D // c, c).mean(2) - S.reshape(B, n, D // c, c).mean(2)).square().mean() * c**0.5
    mean = (T.mean(1) - S.mean(1)).square().mean() * D**0.5
    if revision == "svd":
        k = min(8, D // 4)
        flat_T, flat_S = T.flatten(0, 1), S.flatten(0, 1)
        s_T, s_S = torch.linalg.svdvals(flat_T.T @ flat_T), torch.linalg.svdvals(flat_S.T @ flat_S)
        singular = (s_T[:k] / s_T[0] - s_S[:k] / s_S[0]).square().mean()
        spectral = [singular if n >= D / 4 else 0 * S.sum()]
    means = [torch.stack(x).mean() for x in (content, cosine, context, temporal, spectral)]
    return dict(zip(TERMS, [*means[:3], local, mean, *means[3:]], strict=True))


def agree(loss: Tensor, expected: Tensor, out: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    (ours,) = torch.autograd.grad(loss, out, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, out, retain_graph=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("revision", ["batch_independent", "svd"])
@pytest.mark.parametrize(("n", "D"), [(13, 48), (70, 32)], ids=["wide", "long"])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_the_naive_one(term: str, n: int, D: int, revision: str) -> None:
    out, wanted = outputs(3, n, D)
    weights = Weights(revision=revision, **{name: float(name == term) for name in TERMS})
    expected = naive_terms(out, wanted, revision)[term]
    agree(ComprehensiveLoss(weights, LAYERS)(out, wanted, 0).mean(), expected, out)


@pytest.mark.parametrize("layer", [0, 4, 9])
def test_the_sum_has_the_published_weights_and_depths(layer: int) -> None:
    out, wanted = outputs(2, 20, 64, seed=layer)
    terms = naive_terms(out, wanted, "batch_independent")
    q = layer / LAYERS
    weights = (1 - 0.3 * q, 2.0, 1 + 0.5 * q, 0.5, 0.5, 1.0, 0.3)
    expected = sum(weight * terms[name] for weight, name in zip(weights, TERMS, strict=True))
    agree(build_align_loss(section(loss="comprehensive"), LAYERS)(out, wanted, layer).mean(), expected, out)


def test_few_tokens_have_no_spectrum_in_the_svd_revision() -> None:
    out, wanted = outputs(1, 3, 64)
    weights = Weights(revision="svd", **{name: float(name == "spectral") for name in TERMS})
    assert ComprehensiveLoss(weights, LAYERS)(out, wanted, 0).tolist() == [0]
    asked = {"loss": "comprehensive", "comprehensive": {"revision": "svd"}}
    assert "of the model's width or more (21 tokens), and context is 20" in (no_spectrum(section(**asked), 81) or "")
    assert no_spectrum(section(**asked), 80) is None
    for other in ({"loss": "l2"}, {"loss": "comprehensive"}, {**asked, "comprehensive": {"spectral": 0.0}}):
        assert no_spectrum(section(**other), 800) is None


LOSSES = {name: {"loss": name} for name in ("l2", "mse", "comprehensive", "scaled_mse")} | {
    "svd": {"loss": "comprehensive", "comprehensive": {"revision": "svd"}}
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_does_not_depend_on_its_batch(name: str) -> None:
    layers = [outputs(4, 20, 32, seed=layer) for layer in range(2)]

    def found(rows: slice) -> Tensor:
        loss = build_align_loss(section(**LOSSES[name]), LAYERS)
        losses = {layer: loss(out[rows], wanted[rows], layer) for layer, (out, wanted) in enumerate(layers)}
        return torch.stack(list((loss.finish(losses) if isinstance(loss, ScaledMse) else losses).values()))

    whole = found(slice(None))
    assert whole.shape == (2, 4)
    apart = torch.cat([found(slice(i, i + 1)) for i in range(4)], dim=1)
    torch.testing.assert_close(whole, apart, rtol=1e-10, atol=0)


def test_a_spectrum_that_cannot_be_had_changes_its_own_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    out, wanted = outputs(3, 20, 32)
    weights = Weights(revision="svd", **{name: float(name == "spectral") for name in TERMS})
    whole = ComprehensiveLoss(weights, LAYERS)(out, wanted, 0)
    eigenvalues, bad = torch.linalg.eigvalsh, out[1] @ out[1].mT

    def failing(gram: Tensor) -> Tensor:
        if torch.equal(gram, bad):
            raise torch.linalg.LinAlgError("on purpose")
        return eigenvalues(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    found = ComprehensiveLoss(weights, LAYERS)(out, wanted, 0)
    assert found[[0, 2]].tolist() == whole[[0, 2]].tolist()
    difference = torch.linalg.matrix_norm(wanted[1].T @ wanted[1] - out[1].T @ out[1]) / (20 * 32)
    torch.testing.assert_close(found[1], difference)


@pytest.mark.parametrize("shape", [(2, 5, 30), (2, 30, 5), (2, 12, 12)])
@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_both_ways_to_the_difference_of_grams_give_it(shape: tuple[int, int, int], distance: float) -> None:
    first, second = (x.detach() for x in outputs(*shape, distance=distance))
    second = first + distance * second
    first.requires_grad_()
    agree(
        gram_difference_norm(first, second).sum(),
        torch.linalg.matrix_norm(first.mT @ first - second.mT @ second).sum(),
        first,
    )


def test_the_difference_of_grams_keeps_its_digits_in_fp32_where_both_are_close() -> None:
    first, second = (x.detach() for x in outputs(1, 16, 512))
    second = first + 1e-4 * second
    exact = torch.linalg.matrix_norm(first.mT @ first - second.mT @ second)
    assert torch.allclose(gram_difference_norm(first.float(), second.float()).double(), exact, rtol=1e-3)


@pytest.mark.parametrize("loss", ["l2", "mse", "comprehensive", "scaled_mse"])
def test_a_perfect_mixer_has_no_loss_and_a_finite_gradient(loss: str) -> None:
    _, wanted = outputs(2, 20, 32)
    out = wanted.float().clone().requires_grad_()
    value = build_align_loss(section(loss=loss), LAYERS)(out, wanted.float(), 3).mean()
    value.backward()
    assert value.detach() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(out.grad).all()


def test_scaled_mse_weighs_layers_by_their_own_size() -> None:
    loss = ScaledMse()
    pairs = [outputs(2, 6, 16, seed=layer) for layer in range(3)]
    pairs = [(out, wanted * 10.0**layer) for layer, (out, wanted) in enumerate(pairs)]
    found = loss.finish({layer: loss(out, wanted, layer) for layer, (out, wanted) in enumerate(pairs)})
    each = []
    for b in range(2):
        norms = [wanted[b].norm(dim=-1).mean() for _, wanted in pairs]
        stacked = [
            (norms[-1] / norm * out[b] - norms[-1] / norm * wanted[b]).square()
            for norm, (out, wanted) in zip(norms, pairs, strict=True)
        ]
        each.append(175 / 64 / norms[-1] * torch.stack(stacked).mean())
    agree(torch.stack(list(found.values())).mean(), torch.stack(each).mean(), pairs[0][0])


def test_l2_is_a_mean_of_norms() -> None:
    out, wanted = outputs(2, 5, 16)
    agree(l2_loss(out, wanted).mean(), (wanted - out).norm(dim=-1).mean() / 4, out)


@pytest.mark.parametrize("kind", ["l2", "mse", "scaled_mse", "comprehensive"])
def test_what_is_no_number_is_not_told_as_a_perfect_mixer(kind: str) -> None:
    """The check for finite numbers before a step must see it."""
    out, wanted = outputs(2, 8, 16)
    out.data[0, 3, 5] = float("nan")
    values = build_align_loss(section(loss=kind), 4)(out, wanted, 1)
    assert values[0].isnan()
    assert values[1].isfinite()


def section(**changes: object) -> Align:
    return Align(tokens=100, context=20, batch=2, **changes)
