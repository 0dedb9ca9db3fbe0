"""Which layers stay softmax attention, where the recipe names a way to choose them; and calibration before align."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, Length, Place, Reads, Section, Seed

if TYPE_CHECKING:
    from radlads.tasks.contracts.recipe.sections import Recipe, Student

_LEAST_DOCUMENTS = 4


class Difficulty(Section):
    """`choose: difficulty`: the layers whose mixers learn worst in an align of all layers, kept apart from each other.

    The published tool (rwkv7_variants §5.2) with its scale term mended. Each part is min-max normalised over the
    layers; `spread` is what a choice loses for uneven gaps, `gap_penalty` for each gap outside min_gap ... max_gap.
    """

    residue: float = Field(default=0.30, ge=0)
    """Weight of the loss at the end."""
    convergence: float = Field(default=0.25, ge=0)
    """Weight of 1 - slope: how slowly the logarithm of the loss falls."""
    alignment: float = Field(default=0.20, ge=0)
    """Weight of 1 - the share of the first loss that is gone at the end."""
    scale: float = Field(default=0.15, ge=0)
    """Weight of |norm ratio of the outputs - 1|, where the align stage recorded it; shared by the others if not."""
    instability: float = Field(default=0.10, ge=0)
    """Weight of the variance of the step-to-step differences."""
    min_gap: int = Field(default=1, ge=1)
    max_gap: int = Field(default=8, ge=1)
    """Gaps are differences of the numbers of neighbouring kept layers."""
    gap_penalty: float = Field(default=0.75, ge=0)
    spread: float = Field(default=0.1, ge=0)
    max_consecutive: int = Field(default=2, ge=1)
    """Kept layers in a row, never more."""

    @model_validator(mode="after")
    def _gaps_are_ordered(self) -> Self:
        if self.min_gap > self.max_gap:
            raise ValueError("min_gap must not be larger than max_gap")
        if not self.residue + self.convergence + self.alignment + self.instability:
            raise ValueError("every weight is 0, so no layer would be harder than another")
        return self


class RecallProbe(Section):
    """`choose: recall`: the layers whose softmax gives back most recall for what is left of the held-out KL.

    Inference only. The probe is made smaller than asked for where it would take more than `budget` of the run.
    """

    lengths: tuple[Length, ...] = Field(default=(256, 512), min_length=1)
    """Tokens of the documents that hide facts and ask for them, used in turn."""
    documents: int = Field(default=128, ge=_LEAST_DOCUMENTS, le=1_000_000)
    """At most."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    haystack_separator: str | None = None
    data: str | None = None
    """Dataset whose held-out text the KL is measured on; None: the one that align learns from."""
    heldout_tokens: int = Field(default=32768, gt=0)
    """At most."""
    context: int = Field(default=512, gt=1)
    """Tokens of a held-out window."""
    micro_batch: Annotated[int, OPERATIONAL] = Field(default=8, gt=0)
    """Sequences of a forward pass."""
    budget: float = Field(default=0.05, gt=0, le=0.05)
    """Share of the run's training tokens that the forward passes of the choice may take."""
    seed: Seed = 1234

    @model_validator(mode="after")
    def _a_window_fits(self) -> Self:
        if self.heldout_tokens < self.context:
            raise ValueError(f"heldout_tokens ({self.heldout_tokens}) is less than one window of {self.context}")
        return self


class AttentionChoice(Section):
    """`attention_layers: {count: N, choose: ...}`.

    even: the last layer, and every (layers // count)-th before it. last: the last ones. Both are known when the run is
    planned. difficulty, recall: found out after an align of all layers, by the stage `choose`.
    """

    count: int = Field(gt=0, le=10_000)
    choose: Literal["even", "last", "difficulty", "recall"]
    difficulty: Difficulty = Difficulty()
    recall: RecallProbe = RecallProbe()

    @model_validator(mode="after")
    def _settings_are_used(self) -> Self:
        for way, default in (("difficulty", Difficulty()), ("recall", RecallProbe())):
            if self.choose != way and getattr(self, way) != default:
                raise ValueError(f"settings of `{way}` are given, but `choose` is {self.choose}; drop them")
        return self

    @property
    def after_align(self) -> bool:
        """Whether the layers are only known once align has ended."""
        return self.choose in ("difficulty", "recall")


class Calibration(Section):
    """Start mixers close to the attention that they replace, from a few batches of the teacher's activations.

    Before the first step of align, on its data. `decay` shifts each head's forgetting by what fits best, of a few
    shifts; `gate` gives every output channel the gain of least squares; `iclr` and `value` shift the in-context
    learning rate and the share of the first layer's values as `decay` does. A variant without such a part keeps it.
    """

    batches: int = Field(default=4, gt=0)
    sequences: int = Field(default=8, gt=0)
    """Sequences of a batch, of align's context."""
    parts: tuple[Literal["value", "iclr", "decay", "gate"], ...] = Field(default=("decay", "gate"), min_length=1)


def _shape(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return "list"
    return "choice" if isinstance(value, Mapping | AttentionChoice) else None


AttentionLayers = Annotated[
    Annotated[tuple[int, ...], Tag("list")] | Annotated[AttentionChoice, Tag("choice")],
    Discriminator(
        _shape,
        custom_error_type="attention_layers",
        custom_error_message="give a list of layers, or {count: N, choose: even | last | difficulty | recall}",
    ),
]


def listed_layers(student: Student) -> tuple[int, ...]:
    """The layers that a recipe names itself; none where it names a way to choose them."""
    return () if isinstance(student.attention_layers, AttentionChoice) else student.attention_layers


def late_choice(recipe: Recipe) -> AttentionChoice | None:
    """The choice that the stage `choose` makes after align; None where there is nothing to choose then."""
    layers = recipe.student.attention_layers
    return layers if isinstance(layers, AttentionChoice) and layers.after_align else None


def choice_data(recipe: Recipe) -> str | None:
    """The dataset that a choice by recall reads, None without one."""
    choice = late_choice(recipe)
    if choice is None or choice.choose != "recall":
        return None
    return choice.recall.data or (recipe.align.data if recipe.align is not None else None)


def check_choice(recipe: Recipe) -> None:
    """What must be there for a choice after align, and for calibration. Raises ValueError."""
    choice = late_choice(recipe)
    if choice is not None and recipe.align is None:
        raise ValueError(
            f"student.attention_layers chooses by {choice.choose}, from an align stage, and the recipe has none; "
            "choose even or last, or name the layers"
        )
    if recipe.student.calibrate is not None and recipe.align is None:
        raise ValueError("student.calibrate works at the start of align, and the recipe has no align stage; drop it")
    data = choice_data(recipe)
    if data is not None and data not in recipe.data:
        known = " and ".join(f"'{name}'" for name in recipe.data)
        raise ValueError(f"student.attention_layers.recall.data is '{data}', but `data` has {known}")


def run_tokens(recipe: Recipe) -> int:
    """Tokens of all training stages: what the cost of a choice is a share of."""
    return sum(getattr(recipe, stage).seen_tokens for stage in recipe.training_stages)


def probe_passes(count: int, num_candidates: int) -> int:
    """Forward passes over the probe, at most: the student as it is, every candidate in every round, the teacher."""
    return 1 + sum(num_candidates - chosen for chosen in range(count)) + count


def fit_probe(probe: RecallProbe, *, count: int, num_candidates: int, tokens: int) -> RecallProbe:
    """The probe with as many documents and held-out tokens as its budget allows. tokens: of the run.

    Raises ValueError where it allows too few.
    """
    passes = probe_passes(count, num_candidates)
    allowed = int(probe.budget * tokens) // passes
    reading = sum(probe.lengths[i % len(probe.lengths)] for i in range(probe.documents))
    if allowed >= reading + probe.heldout_tokens:
        return probe
    # Half for each kind, and what one does not need for the other.
    documents = min(
        probe.documents, _documents_within(probe.lengths, max(allowed // 2, allowed - probe.heldout_tokens))
    )
    reading = sum(probe.lengths[i % len(probe.lengths)] for i in range(documents))
    windows = min(probe.heldout_tokens, allowed - reading) // probe.context
    if windows < 1 or documents < _LEAST_DOCUMENTS:
        raise ValueError(
            f"choosing {count} of {num_candidates} layers by recall takes {passes} passes, and {probe.budget:.0%} of "
            f"the run's {tokens} tokens leave {allowed} to each, too few to tell layers apart; train on more tokens, "
            "shorten recall.lengths or recall.context, or choose even, last or difficulty"
        )
    return probe.model_copy(update={"documents": documents, "heldout_tokens": windows * probe.context})


def _documents_within(lengths: Sequence[int], tokens: int) -> int:
    """How many documents of these lengths, taken in turn, fit into so many tokens."""
    count = 0
    while tokens >= lengths[count % len(lengths)]:
        tokens -= lengths[count % len(lengths)]
        count += 1
    return count
