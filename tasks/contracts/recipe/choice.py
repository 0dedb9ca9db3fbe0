"""Settings for choosing the attention layers, and for calibrating mixers before align."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, Length, Place, Reads, Section, Seed

if TYPE_CHECKING:
    from radlads.tasks.contracts.recipe.sections import Recipe, Student

_LEAST_DOCUMENTS = 4


class Difficulty(Section):
    """`choose: difficulty`: the layers whose mixers learn worst in an align of all layers, spaced apart.

    The published tool (rwkv7_variants §5.2) with its scale term corrected. Each part is min-max normalised over the
    layers. `spread` is the penalty for uneven gaps, `gap_penalty` for each gap outside min_gap ... max_gap.
    """

    residue: float = Field(default=0.30, ge=0)
    """Weight of the final loss."""
    convergence: float = Field(default=0.25, ge=0)
    """Weight of 1 - slope, where slope is the decrease of the log loss."""
    alignment: float = Field(default=0.20, ge=0)
    """Weight of 1 - (first loss - final loss) / first loss."""
    scale: float = Field(default=0.15, ge=0)
    """Weight of |norm ratio of the outputs - 1|, if recorded in align; else distributed over the other weights."""
    instability: float = Field(default=0.10, ge=0)
    """Weight of the variance of the loss differences between steps."""
    min_gap: int = Field(default=1, ge=1)
    max_gap: int = Field(default=8, ge=1)
    """A gap is the difference between the indices of consecutive attention layers."""
    gap_penalty: float = Field(default=0.75, ge=0)
    spread: float = Field(default=0.1, ge=0)
    max_consecutive: int = Field(default=2, ge=1)
    """Maximum number of adjacent attention layers."""

    @model_validator(mode="after")
    def _gaps_are_ordered(self) -> Self:
        if self.min_gap > self.max_gap:
            raise ValueError("min_gap must not be larger than max_gap")
        if not self.residue + self.convergence + self.alignment + self.instability:
            raise ValueError("all weights are 0, so all layers would have the same score")
        return self


class RecallProbe(Section):
    """`choose: recall`: the layers whose softmax attention restores most recall relative to the remaining held-out KL.

    Inference only. The probe is reduced if it would exceed `budget`.
    """

    lengths: tuple[Length, ...] = Field(default=(256, 512), min_length=1)
    """Lengths of the quiz documents in tokens, used in turn."""
    documents: int = Field(default=128, ge=_LEAST_DOCUMENTS, le=1_000_000)
    """Maximum number of quiz documents."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    haystack_separator: str | None = None
    data: str | None = None
    """Dataset whose held-out text is used to measure KL; None: the dataset of align."""
    heldout_tokens: int = Field(default=32768, gt=0)
    """Maximum number of held-out tokens."""
    context: int = Field(default=512, gt=1)
    """Length of a held-out window in tokens."""
    micro_batch: Annotated[int, OPERATIONAL] = Field(default=8, gt=0)
    """Sequences per forward pass."""
    budget: float = Field(default=0.05, gt=0, le=0.05)
    """Maximum tokens of the forward passes of the choice, as a fraction of the run's training tokens."""
    seed: Seed = 1234

    @model_validator(mode="after")
    def _a_window_fits(self) -> Self:
        if self.heldout_tokens < self.context:
            raise ValueError(f"heldout_tokens ({self.heldout_tokens}) is fewer than one window of {self.context}")
        return self


class AttentionChoice(Section):
    """`attention_layers: {count: N, choose: ...}`.

    even: the last layer and every (layers // count)-th layer before it. last: the last layers. Both are resolved when
    the run is planned. difficulty, recall: resolved by the `choose` stage after an align of all layers.
    """

    count: int = Field(gt=0, le=10_000)
    choose: Literal["even", "last", "difficulty", "recall"]
    difficulty: Difficulty = Difficulty()
    recall: RecallProbe = RecallProbe()

    @model_validator(mode="after")
    def _settings_are_used(self) -> Self:
        for way, default in (("difficulty", Difficulty()), ("recall", RecallProbe())):
            if self.choose != way and getattr(self, way) != default:
                raise ValueError(f"settings of `{way}` are given, but `choose` is {self.choose}; remove them")
        return self

    @property
    def after_align(self) -> bool:
        """Whether the layers are chosen after align."""
        return self.choose in ("difficulty", "recall")


class Calibration(Section):
    """Initialise mixers close to the attention that they replace, from a few batches of teacher activations.

    Runs before the first step of align, on its data. `decay` selects, per head, the best of a few shifts of the decay.
    `gate` sets the least-squares gain of each output channel. `iclr` and `value` select shifts of the in-context
    learning rate and of the first-value mix, as `decay` does. Parts that a variant does not have are skipped.
    """

    batches: int = Field(default=4, gt=0)
    sequences: int = Field(default=8, gt=0)
    """Sequences per batch, with the context length of align."""
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
    """The attention layers listed in a recipe; empty if they are to be chosen."""
    return () if isinstance(student.attention_layers, AttentionChoice) else student.attention_layers


def late_choice(recipe: Recipe) -> AttentionChoice | None:
    """The choice to make after align; None if the layers are listed or resolved by the plan."""
    layers = recipe.student.attention_layers
    return layers if isinstance(layers, AttentionChoice) and layers.after_align else None


def choice_data(recipe: Recipe) -> str | None:
    """The dataset that a choice by recall reads; None for other choices."""
    choice = late_choice(recipe)
    if choice is None or choice.choose != "recall":
        return None
    return choice.recall.data or (recipe.align.data if recipe.align is not None else None)


def check_choice(recipe: Recipe) -> None:
    """Raises ValueError if a choice after align or a calibration lacks its align stage or dataset."""
    choice = late_choice(recipe)
    if choice is not None and recipe.align is None:
        raise ValueError(
            f"student.attention_layers: choose: {choice.choose} needs an align stage, and the recipe has none; "
            "choose even or last, or list the layers"
        )
    if recipe.student.calibrate is not None and recipe.align is None:
        raise ValueError("student.calibrate needs an align stage, and the recipe has none; remove it")
    data = choice_data(recipe)
    if data is not None and data not in recipe.data:
        known = " and ".join(f"'{name}'" for name in recipe.data)
        raise ValueError(f"student.attention_layers.recall.data is '{data}', but `data` has {known}")


def run_tokens(recipe: Recipe) -> int:
    """Tokens of all training stages: what the cost of a choice is a share of."""
    return sum(getattr(recipe, stage).seen_tokens for stage in recipe.training_stages)


def probe_passes(count: int, num_candidates: int) -> int:
    """Maximum forward passes over the probe: the initial student, each candidate in each round, the teacher."""
    return 1 + sum(num_candidates - chosen for chosen in range(count)) + count


def fit_probe(probe: RecallProbe, *, count: int, num_candidates: int, tokens: int) -> RecallProbe:
    """Reduce the probe's documents and held-out tokens to its budget. tokens: training tokens of the run.

    Raises ValueError if the budget is too small.
    """
    passes = probe_passes(count, num_candidates)
    allowed = int(probe.budget * tokens) // passes
    reading = sum(probe.lengths[i % len(probe.lengths)] for i in range(probe.documents))
    if allowed >= reading + probe.heldout_tokens:
        return probe
    # Half of the tokens for each kind; one kind may use what the other does not need.
    documents = min(
        probe.documents, _documents_within(probe.lengths, max(allowed // 2, allowed - probe.heldout_tokens))
    )
    reading = sum(probe.lengths[i % len(probe.lengths)] for i in range(documents))
    windows = min(probe.heldout_tokens, allowed - reading) // probe.context
    if windows < 1 or documents < _LEAST_DOCUMENTS:
        raise ValueError(
            f"choosing {count} of {num_candidates} layers by recall takes {passes} passes, and {probe.budget:.0%} of "
            f"the run's {tokens} tokens allow {allowed} tokens per pass, too few to compare layers; train on more "
            "tokens, shorten recall.lengths or recall.context, or choose even, last or difficulty"
        )
    return probe.model_copy(update={"documents": documents, "heldout_tokens": windows * probe.context})


def _documents_within(lengths: Sequence[int], tokens: int) -> int:
    """Number of documents, with lengths used in turn, that fit in a token count."""
    count = 0
    while tokens >= lengths[count % len(lengths)]:
        tokens -= lengths[count % len(lengths)]
        count += 1
    return count
