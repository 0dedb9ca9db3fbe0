"""Initialise mixers close to the attention that they replace: a few parameters fitted to activations, no training.

Dims: B batch, T time, D model width, H query heads, K key (and value) dim per head, A = H·K channels before o_proj,
R low rank.

z [B,T,A] is a mixer's input to o_proj, z* the teacher's attention's input to its own. Both are multiplied by the same
matrix (up to a factor, if the transplant scaled it), so a mixer with z = z* is aligned. Per layer, on the teacher's
own inputs:

    value, iclr, decay   Offsets [A] or [H] before a nonlinearity (v0, a0, w0). A head's channels move together, by the
                         shift of -6 … 6 that leaves the smallest ‖z* - z‖² in the head, for the channels' best
                         gains.
    gate                 z is linear in the gate's second factor (g2 [R,A]), and where there is none in the norm's
                         weight (ln_x [A]): every channel's gain is that of least squares, z + Δ u with
                         Δ = <u, z* - z> / <u, u>, u = ∂z/∂gain.

The variant's `Mixer.CALIBRATED` maps parts to parameters; a part that it lacks is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from radlads.model.mixers.shared.mixer import Mixer
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import find_family
from radlads.model.training.align_losses import LayerLoss, l2_loss
from radlads.model.training.hidden_states import plain_hidden
from radlads.model.training.probe import AttentionProbe
from radlads.model.weights.finite import check_finite

# In order of size, so that of two equally good shifts the smaller one is used.
SHIFTS = (0.0, -1.0, 1.0, -2.0, 2.0, -4.0, 4.0, -6.0, 6.0)
_OFFSETS = ("value", "iclr", "decay")
_TINY = 1e-12


@torch.no_grad()
def alignment_losses(
    student: RadladsForCausalLM, teacher: PreTrainedModel, batches: Iterable[Tensor], *, loss: LayerLoss = l2_loss
) -> dict[int, float]:
    """Layer → the loss of stage 1, without training. batches: input ids [B,T], of any sizes; weighted by tokens."""
    totals: dict[int, float] = defaultdict(float)
    tokens = 0
    for ids in batches:
        with _LossProbe(teacher, student, loss=loss) as probe:
            plain_hidden(teacher, ids.to(teacher.device), None)
        for layer, value in probe.losses.items():
            totals[layer] += float(value) * ids.numel()
        tokens += ids.numel()
    return {layer: total / tokens for layer, total in sorted(totals.items())}


def alignment_loss(
    student: RadladsForCausalLM, teacher: PreTrainedModel, batches: Iterable[Tensor], *, loss: LayerLoss = l2_loss
) -> float:
    """The mean over layers of `alignment_losses`: what the align stage minimises. NaN without a converted layer."""
    losses = alignment_losses(student, teacher, batches, loss=loss)
    return sum(losses.values()) / len(losses) if losses else float("nan")


@torch.no_grad()
def calibrate(
    student: RadladsForCausalLM,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    parts: Sequence[str] = ("decay", "gate"),
) -> dict[int, dict[str, list[float]]]:
    """Fit the parts of every mixer, one after the other: value, iclr, decay, gate. Changes the student in place.

    batches: input ids [B,T]. Deterministic. Returns layer → part → what was done: the shift of each head (offsets), the
    change of each channel's gain (gate). Raises ValueError for an unknown part, UserError for a fit that is not finite.
    """
    unknown = sorted(set(parts) - {*_OFFSETS, "gate"})
    if unknown:
        raise ValueError(f"no part '{unknown[0]}' to calibrate; there are {', '.join((*_OFFSETS, 'gate'))}")
    report: dict[int, dict[str, list[float]]] = {layer: {} for layer in student.mixers()}
    for part in (*_OFFSETS, "gate"):
        if part not in parts:
            continue
        fit: _Fit = _GainFit(teacher, student) if part == "gate" else _ShiftFit(teacher, student, part, "gate" in parts)
        for ids in batches:
            with fit:
                plain_hidden(teacher, ids.to(teacher.device), None)
        for layer, mixer in student.mixers().items():
            done = fit.settle(layer, mixer)
            if done is not None:
                report[layer][part] = done
                for name, tensor in mixer.state_dict().items():
                    check_finite(f"{name} of layer {layer}, calibrated by its {part},", tensor)
    return report


class _LossProbe(AttentionProbe):
    """The losses of stage 1 without their graphs."""

    def compare(self, layer: int, mixer: Mixer, x_BTD: Tensor, rope: tuple[Tensor, Tensor], wanted_BTD: Tensor) -> None:
        mixed = mixer.mix(x_BTD, rope=rope, first=self._first, cu_seqlens=self._cu_seqlens)
        self._found[layer], self._first = self._loss(mixed.out.float(), wanted_BTD.float(), layer), mixed.first


class _Fit(AttentionProbe):
    """Records the inputs of o_proj: the teacher's attention's, and the mixer's."""

    def __init__(self, teacher: PreTrainedModel, student: RadladsForCausalLM) -> None:
        super().__init__(teacher, student)
        self._before_o: dict[int, Tensor] = {}
        self._inner: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        family = find_family(self._teacher.config)
        attentions = family.attention_modules(self._teacher)
        for layer in self._student.mixers():
            projection: nn.Module = getattr(attentions[layer], family.o)
            self._inner.append(projection.register_forward_pre_hook(self._keep(layer)))
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._inner:
            hook.remove()
        self._inner.clear()
        self._first = None
        super().__exit__(kind, error, traceback)

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._before_o[layer] = args[0].detach()

        return hook

    def compare(self, layer: int, mixer: Mixer, x_BTD: Tensor, rope: tuple[Tensor, Tensor], wanted_BTD: Tensor) -> None:
        target_BTA = self._before_o.pop(layer)
        # The student's o_proj may be the teacher's times a factor, by which z is corrected.
        own = mixer.o_proj(target_BTA).float()
        factor = (own * wanted_BTD.float()).sum() / own.square().sum().clamp_min(_TINY)
        given = {"rope": rope, "first": self._first, "cu_seqlens": self._cu_seqlens}

        def run() -> Tensor:
            """z [N,A] in fp32."""
            seen: list[Tensor] = []
            hook = mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            try:
                self._first_of_run = mixer.mix(x_BTD, **given).first
            finally:
                hook.remove()
            return seen[0].flatten(0, 1).float()

        self.watch(layer, mixer, run, target_BTA.flatten(0, 1).float() * factor)
        run()
        self._first = self._first_of_run

    def watch(self, layer: int, mixer: Mixer, run: Callable[[], Tensor], target_NA: Tensor) -> None:
        """Accumulate the statistics of one layer and one batch. run: the mixer as it is now → z [N,A]."""
        raise NotImplementedError

    def settle(self, layer: int, mixer: Mixer) -> list[float] | None:
        """Apply the fit to the mixer; None if it has no such part."""
        raise NotImplementedError


class _GainFit(_Fit):
    """Every channel's gain by least squares."""

    def __init__(self, teacher: PreTrainedModel, student: RadladsForCausalLM) -> None:
        super().__init__(teacher, student)
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(self, layer: int, mixer: Mixer, run: Callable[[], Tensor], target_NA: Tensor) -> None:
        gain = _gain(mixer)
        if gain is None:
            return
        z = run()
        u = _slope(gain, run, z)
        sums = ((u * (target_NA - z)).sum(0).double(), u.square().sum(0).double())
        before = self._sums.get(layer)
        self._sums[layer] = sums if before is None else (before[0] + sums[0], before[1] + sums[1])

    def settle(self, layer: int, mixer: Mixer) -> list[float] | None:
        gain = _gain(mixer)
        if gain is None:
            return None
        above, below = self._sums[layer]
        change = above / (below + 1e-6 * below.mean() + _TINY)
        _raise_gain(gain, change)
        return [float(value) for value in change]


class _ShiftFit(_Fit):
    """Each head's offsets by the shift that fits best."""

    def __init__(self, teacher: PreTrainedModel, student: RadladsForCausalLM, part: str, gains: bool) -> None:
        super().__init__(teacher, student)
        self._part, self._gains = part, gains
        # Layer → for every shift: Σ (z* - z)², Σ u (z* - z), Σ u², all [A].
        self._sums: dict[int, Tensor] = {}

    def watch(self, layer: int, mixer: Mixer, run: Callable[[], Tensor], target_NA: Tensor) -> None:
        offset = _offset(mixer, self._part)
        if offset is None:
            return
        gain = _gain(mixer) if self._gains else None
        found = []
        for shift in SHIFTS:
            with _moved(offset, shift):
                z = run()
                rest = target_NA - z
                u = torch.zeros_like(z) if gain is None else _slope(gain, run, z)
                found.append(torch.stack([rest.square().sum(0), (u * rest).sum(0), u.square().sum(0)]))
        sums = torch.stack(found).double()
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def settle(self, layer: int, mixer: Mixer) -> list[float] | None:
        offset = _offset(mixer, self._part)
        if offset is None:
            return None
        error, across, square = self._sums[layer].unbind(1)
        left = error - across.square() / (square + _TINY)
        # Offsets are of channels, or one a head [H]; of query heads, or of the kv heads that several of those share.
        width = 1 if offset.dim() == 1 else mixer.shape.head_dim
        left = left.unflatten(1, (offset.numel() // width, -1)).sum(-1)
        # argmin returns the first of equal values, the smallest shift; it treats NaN as the least, so NaN is no fit.
        best = left.where(left.isfinite(), torch.inf).argmin(0)
        shifts = torch.tensor(SHIFTS, dtype=torch.float64, device=best.device)[best]
        offset.add_(shifts.repeat_interleave(width).view_as(offset).to(offset.dtype))
        return [float(shift) for shift in shifts]


def _offset(mixer: Mixer, part: str) -> Tensor | None:
    found = getattr(mixer, mixer.CALIBRATED.get(part, ""), None)
    return found if isinstance(found, Tensor) else None


def _gain(mixer: Mixer) -> Tensor | None:
    """The parameter in which z is linear: the gate's second factor [R,A], else the norm's weight [A]."""
    for part in ("gate", "norm"):
        found = getattr(mixer, mixer.CALIBRATED.get(part, ""), None)
        found = found.weight if isinstance(found, nn.GroupNorm) else found
        if isinstance(found, Tensor):
            return found
    return None


def _raise_gain(gain: Tensor, change_A: Tensor) -> None:
    """Add to every channel's gain. A gate's first factor starts at zero, where each of its R rows counts one half."""
    rows = gain.shape[0] / 2 if gain.dim() == 2 else 1.0
    gain.add_((change_A / rows).to(gain.dtype))


def _slope(gain: Tensor, run: Callable[[], Tensor], z_NA: Tensor) -> Tensor:
    """∂z/∂gain [N,A]; exact but for rounding, as z is linear in it."""
    before = gain.clone()
    try:
        _raise_gain(gain, torch.ones(gain.shape[-1], dtype=torch.float64, device=gain.device))
        return run() - z_NA
    finally:
        gain.copy_(before)


@contextmanager
def _moved(offset: Tensor, shift: float) -> Iterator[None]:
    before = offset.clone()
    offset.add_(shift)
    try:
        yield
    finally:
        offset.copy_(before)
