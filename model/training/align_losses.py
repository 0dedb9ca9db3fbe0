"""Losses of stage 1, between an attention's output T (the teacher's) and its mixer's output S, [B,T,D] after o_proj.

Every loss is [B], one value a sequence and layer, computed in fp32 (in fp64 for such inputs); a stage's loss is the
mean over sequences and layers. No sequence's value depends on another one, so the result does not depend on how
a step is divided into forward passes and ranks. Sources: 2505.03005, and the revisions V0 to V3 of
rwkv7_variants §7.2; published statistics of a whole micro-batch are statistics of each sequence here,
which is equal at a micro-batch of one.

Dims: B batch, n time, D model width, L layers of the model, q = layer / L.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from radlads.kernels.row_distance import squared_distance
from radlads.model.training.settings import AlignSettings, ComprehensiveSettings

LayerLoss = Callable[[Tensor, Tensor, int], Tensor]
"""(actual output S, expected output T, layer) → [B]."""

_DEPTH_CONTENT, _DEPTH_CONTEXT = -0.3, 0.5
_SINGULAR_VALUES = 8
_GROUPS = 16
# V3: the measured norm of the last attention output of Qwen3-8B over √4096, published as constants.
_SCALED_MSE = 175 / 64


def l2_loss(out_BTD: Tensor, wanted_BTD: Tensor, layer: int = 0) -> Tensor:
    """V0. Mean over tokens of ‖T − S‖₂ · D^(−1/2): not squared, it reads like an RMS error (2505.03005)."""
    return _sqrt(squared_distance(out_BTD, wanted_BTD)).mean(-1) * out_BTD.shape[-1] ** -0.5


def mse_loss(out_BTD: Tensor, wanted_BTD: Tensor, layer: int = 0) -> Tensor:
    """V2. Mean over all elements of (T − S)² (hxa079; 2601.22156)."""
    return squared_distance(out_BTD, wanted_BTD).mean(-1) / out_BTD.shape[-1]


class ScaledMse:
    """V3: every layer's error relative to how large its attention's output is.

    With n_l the mean over a sequence's tokens of ‖T_l‖₂ and s_l = n_L / n_l, L here the last converted layer:

        loss = (175/64) / n_L · mean over layers of MSE(s_l S_l, s_l T_l) = (175/64) · n_L · mean_l MSE(S_l, T_l) / n_l²

    of every sequence. Published, n_l is the mean over the tokens of a whole micro-batch, so that the objective depends
    on its size. n_L is known when the last layer was seen, so `finish` multiplies by it.
    """

    def __init__(self) -> None:
        self._norm: tuple[int, Tensor] | None = None

    def __call__(self, out_BTD: Tensor, wanted_BTD: Tensor, layer: int) -> Tensor:
        norm_B = torch.linalg.vector_norm(wanted_BTD, dim=-1, dtype=_wide(wanted_BTD)).mean(-1).detach()
        if self._norm is None or layer >= self._norm[0]:
            self._norm = (layer, norm_B)
        return mse_loss(out_BTD, wanted_BTD) / norm_B.square()

    def finish(self, losses: dict[int, Tensor]) -> dict[int, Tensor]:
        """The layers' losses of a pass, once all of them are there."""
        if self._norm is None:
            return losses
        factor = _SCALED_MSE * self._norm[1]
        return {layer: factor * value for layer, value in losses.items()}


class ComprehensiveLoss:
    """V1, the loss of cxa073: the sum of seven terms, each of one sequence.

    1. content, weight c₁ (1 − 0.3 q): mean over tokens of ‖T − s S‖₂ · D^(−1/2), with s = mean|T| / (mean|S| + 1e−8)
       detached;
    2. cosine, c₂: 1 − mean over tokens of cos(T, S);
    3. context, c₃ (1 + 0.5 q): ‖T̂T̂' − ŜŜ'‖_F / n², T̂ and Ŝ normalised per token: similarities of tokens;
    4. local, c₄: √c · MSE of the means over the groups of channels i, i + c, i + 2c, …, where c = ⌊D/16⌋ (as published,
       where the means were probably meant to be of neighbours);
    5. sequence mean, c₅ (published as `global`): √D · MSE of the means over time;
    6. temporal, c₆: 1 − cos(ΔT, ΔS), ΔT the differences of neighbours in time, flattened;
    7. spectral, c₇: ‖T'T − S'S‖_F / (n D).

    The revision `svd` before it: 7. is the MSE of the min(8, D/4) largest singular values of T'T and S'S, each divided
    by the largest; only if n ≥ D/4 (`no_spectrum`), and the difference of above where the decomposition fails.
    Published, these values and s in 1. were those of all tokens of a micro-batch.

    No D×D matrix is made where n < D, nor an n×n one where D < n (`gram_difference_norm`).
    """

    def __init__(self, weights: ComprehensiveSettings, num_layers: int) -> None:
        """weights: a recipe's `align.comprehensive`."""
        self.weights, self.num_layers = weights, num_layers
        self.svd = weights.revision == "svd"

    def __call__(self, out_BTD: Tensor, wanted_BTD: Tensor, layer: int) -> Tensor:
        weights, q = self.weights, layer / self.num_layers
        out_BTD, wanted_BTD = (x.to(_wide(x)) for x in (out_BTD, wanted_BTD))
        terms = {
            "content": (weights.content * (1 + _DEPTH_CONTENT * q), _content),
            "cosine": (weights.cosine, _cosine),
            "context": (weights.context * (1 + _DEPTH_CONTEXT * q), _context),
            "local": (weights.local, _local),
            "sequence_mean": (weights.sequence_mean, _sequence_mean),
            "temporal": (weights.temporal, _temporal),
            "spectral": (weights.spectral, _singular_values if self.svd else _spectral),
        }
        parts = [weight * term(out_BTD, wanted_BTD) for weight, term in terms.values() if weight]
        return torch.stack(parts).sum(0) if parts else _nothing(out_BTD)


def build_align_loss(section: AlignSettings, num_layers: int) -> LayerLoss:
    """The loss that an align section names; num_layers: of the model, converted or not."""
    kinds: dict[str, Callable[[], LayerLoss]] = {
        "l2": lambda: l2_loss,
        "mse": lambda: mse_loss,
        "scaled_mse": ScaledMse,
        "comprehensive": lambda: ComprehensiveLoss(section.comprehensive, num_layers),
    }
    return kinds[section.loss]()


def no_spectrum(section: AlignSettings, width: int) -> str | None:
    """Why an align section's loss would lack its spectral term, in one line; None if it has it. width: D."""
    weights = section.comprehensive
    has_spectrum = section.loss == "comprehensive" and weights.revision == "svd" and weights.spectral > 0
    if not has_spectrum or section.context >= width / 4:
        return None
    return (
        f"comprehensive.revision svd compares spectra of sequences of a quarter of the model's width or more "
        f"({-(-width // 4)} tokens), and context is {section.context}; raise it, set comprehensive.spectral to 0, or "
        "use the revision batch_independent"
    )


def gram_difference_norm(first_BNM: Tensor, second_BNM: Tensor) -> Tensor:
    """‖F'F − S'S‖_F of every matrix [N,M] of a batch, [B], through N×N or M×M products, whichever is smaller.

    With E = F − S and P = (F + S)/2, F'F − S'S = P'E + E'P exactly, which does not cancel where S is close to F, and
    ‖P'E + E'P‖² = 2 Σ (PP' ∘ EE') + 2 Σ (PE' ∘ EP'). The gradient at equality is zero.
    """
    error, middle = first_BNM - second_BNM, (first_BNM + second_BNM) / 2
    if first_BNM.shape[-1] <= first_BNM.shape[-2]:
        product = middle.mT @ error
        return torch.linalg.matrix_norm(product + product.mT)
    cross = middle @ error.mT
    square = 2 * ((middle @ middle.mT) * (error @ error.mT)).sum((-2, -1)) + 2 * (cross * cross.mT).sum((-2, -1))
    return _sqrt(square)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sqrt(square: Tensor) -> Tensor:
    """√x, with 0 and a gradient of 0 where rounding or equality leaves x ≤ 0. What is no number stays none."""
    positive = ~(square <= 0)
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def _mse(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    return nn.functional.mse_loss(out_BTD, wanted_BTD, reduction="none").flatten(1).mean(-1)


def _nothing(out_BTD: Tensor) -> Tensor:
    """A loss of 0 for every sequence, with a gradient of 0."""
    return 0 * out_BTD.sum((1, 2))


def _content(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    scale = wanted_BTD.abs().mean((1, 2), keepdim=True) / (out_BTD.abs().mean((1, 2), keepdim=True) + 1e-8)
    return l2_loss(scale.detach() * out_BTD, wanted_BTD)


def _cosine(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    return 1 - nn.functional.cosine_similarity(out_BTD, wanted_BTD, dim=-1).mean(-1)


def _context(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    ours, theirs = (nn.functional.normalize(x, dim=-1).mT for x in (out_BTD, wanted_BTD))
    return gram_difference_norm(theirs, ours) / out_BTD.shape[1] ** 2


def _local(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    width = max(1, out_BTD.shape[-1] // _GROUPS)
    whole = out_BTD.shape[-1] // width * width
    ours, theirs = (x[..., :whole].unflatten(-1, (-1, width)).mean(-2) for x in (out_BTD, wanted_BTD))
    return _mse(ours, theirs) * width**0.5


def _sequence_mean(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    return _mse(out_BTD.mean(1), wanted_BTD.mean(1)) * out_BTD.shape[-1] ** 0.5


def _temporal(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    if out_BTD.shape[1] < 2:
        return _nothing(out_BTD)
    ours, theirs = (x.diff(dim=1).flatten(1) for x in (out_BTD, wanted_BTD))
    return 1 - nn.functional.cosine_similarity(ours, theirs, dim=-1)


def _spectral(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    return gram_difference_norm(wanted_BTD, out_BTD) / (out_BTD.shape[1] * out_BTD.shape[2])


def _singular_values(out_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    if out_BTD.shape[1] < out_BTD.shape[2] / 4:
        return _nothing(out_BTD)
    # One by one: a failing decomposition must not change the loss of other sequences.
    return torch.stack([_spectrum(*pair) for pair in zip(out_BTD, wanted_BTD, strict=True)])


def _spectrum(out_TD: Tensor, wanted_TD: Tensor) -> Tensor:
    count = max(1, min(_SINGULAR_VALUES, out_TD.shape[1] // 4))
    try:
        return nn.functional.mse_loss(_leading(out_TD, count), _leading(wanted_TD, count))
    except torch.linalg.LinAlgError:
        return _spectral(out_TD[None], wanted_TD[None])[0]


def _leading(x_TD: Tensor, count: int) -> Tensor:
    """The largest singular values of X'X, over the largest of all: eigenvalues of the smaller of X'X and XX'."""
    gram = x_TD @ x_TD.mT if x_TD.shape[0] < x_TD.shape[1] else x_TD.mT @ x_TD
    values = torch.linalg.eigvalsh(gram).flip(0)[:count]
    return values / values[0]
