"""Attributes of a training section that objectives read, so that this package does not depend on recipes.

The sections of a recipe (`align`, `distill`, ...) have these attributes; any other object with them can be used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable


class SectionSettings(Protocol):
    """Of every training section."""

    @property
    def freeze(self) -> Collection[str]:
        """Groups of parameters that do not train, and `final_norm`."""

    @property
    def reset_at_documents(self) -> bool:
        """Whether state, attention and positions restart at every document."""


class ComprehensiveSettings(Protocol):
    """Weights of the terms of `ComprehensiveLoss`."""

    @property
    def content(self) -> float: ...
    @property
    def cosine(self) -> float: ...
    @property
    def context(self) -> float: ...
    @property
    def local(self) -> float: ...
    @property
    def sequence_mean(self) -> float: ...
    @property
    def temporal(self) -> float: ...
    @property
    def spectral(self) -> float: ...
    @property
    def revision(self) -> str:
        """batch_independent or svd."""


class AlignSettings(SectionSettings, Protocol):
    @property
    def loss(self) -> str:
        """l2, mse, comprehensive or scaled_mse."""

    @property
    def comprehensive(self) -> ComprehensiveSettings: ...
    @property
    def context(self) -> int:
        """Tokens of a sequence."""


class SpikeSettings(Protocol):
    """Weight of the cross entropy in every `every`-th step."""

    @property
    def weight(self) -> float: ...
    def has(self, step: int) -> bool:
        """Whether a step of a phase, counted from 0, is one of them."""


class DistillPhase(Protocol):
    @property
    def divergence(self) -> str:
        """forward, reverse or jsd."""

    @property
    def jsd_beta(self) -> float: ...

    @property
    def temperature(self) -> float: ...
    @property
    def teacher_temperature(self) -> float | None: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def ce_weight(self) -> float: ...
    @property
    def ce_spikes(self) -> SpikeSettings | None: ...
    @property
    def l2wrap(self) -> float: ...
    @property
    def hidden_weight(self) -> float:
        """Of the distance of the hidden states; 0: none is computed."""


class DistillSettings(SectionSettings, Protocol):
    @property
    def parts(self) -> Sequence[DistillPhase]:
        """The phases; the section itself where it has none."""

    @property
    def rope_fade(self) -> object | None:
        """Not None: kept layers lose their rotary positions by and by, as `rope_factor` says."""

    def rope_factor(self, step: int) -> float:
        """By which a step, counted from 0, multiplies their rotary angles: from 1 to 0."""

    def place(self, step: int) -> tuple[int, int]:
        """Phase of an optimizer step, counted from 0, and the step's number in it."""


class TeacherKlPart(Protocol):
    @property
    def teacher_kl(self) -> float:
        """Weight of the KL to the teacher; 0: none is computed."""


class ExtendSettings(SectionSettings, Protocol):
    @property
    def parts(self) -> Sequence[TeacherKlPart]:
        """The phases; the section itself where it has none."""

    @property
    def asks_teacher(self) -> bool:
        """Whether any phase has a KL term."""

    def place(self, step: int) -> tuple[int, int]:
        """Phase of an optimizer step, counted from 0, and the step's number in it."""


class LoraSettings(Protocol):
    @property
    def targets(self) -> Collection[str]:
        """Last names of linear modules."""

    @property
    def rank(self) -> int: ...
    @property
    def scale(self) -> float: ...


@runtime_checkable
class HasLora(Protocol):
    """A section that may train low-rank updates instead of weights."""

    @property
    def lora(self) -> LoraSettings | None: ...


@runtime_checkable
class HasTrainOnly(Protocol):
    """A section that may train parts of the mixers alone."""

    @property
    def train_only(self) -> Collection[str]:
        """mixer, decay, token_shift; empty: all that `freeze` leaves."""


@runtime_checkable
class HasLabelChoices(Protocol):
    """A section of next-token training that may smooth labels and choose which count."""

    @property
    def label_smoothing(self) -> float: ...
    @property
    def assistant_only(self) -> bool: ...


class ObjectiveSettings(Protocol):
    """The settings of a training job."""

    @property
    def objective(self) -> str:
        """A training stage."""

    @property
    def section(self) -> SectionSettings: ...
