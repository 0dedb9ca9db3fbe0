"""Settings for choosing the attention layers, and for calibrating mixers before align."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, AddedLater, Length, Place, Reads, Section, Seed
from radlads.tasks.contracts.recipe.judging.ruler import OneNeedle

if TYPE_CHECKING:
    from radlads.tasks.contracts.recipe.losses import Distill
    from radlads.tasks.contracts.recipe.sections import Recipe, Student

_LEAST_DOCUMENTS = 4
_MOST_IN_PAIRS = 20
"""Layers of which all pairs may be measured: all sets of them are compared."""
_HAYSTACK_NEEDED = ("niah_single_2", "niah_single_3", "niah_multikey_1")

Search = Literal["one_at_a_time", "greedy", "pairs"]


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
    """Smallest gap that costs no penalty."""
    max_gap: int = Field(default=8, ge=1)
    """Largest gap that costs no penalty. A gap is the difference between the indices of consecutive attention
    layers."""
    gap_penalty: float = Field(default=0.75, ge=0)
    """Of each gap outside min_gap to max_gap."""
    spread: float = Field(default=0.1, ge=0)
    """Penalty for uneven gaps."""
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
    """Files (as in `files`) with the text that hides facts or needles; empty: the built-in filler."""
    haystack_separator: str | None = None
    """As `separator` of `files`, for the haystack."""
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
    """Of the quiz documents."""

    @property
    def quiz_tokens(self) -> int:
        """Tokens of all quiz documents."""
        return sum(self.lengths[i % len(self.lengths)] for i in range(self.documents))

    @model_validator(mode="after")
    def _a_window_fits(self) -> Self:
        if self.heldout_tokens < self.context:
            raise ValueError(f"heldout_tokens ({self.heldout_tokens}) is fewer than one window of {self.context}")
        return self


class NeedleProbe(Section):
    """`probe` of `choose: recall`: quiz documents are prompts of RULER's needles, of strings that judging never draws.

    The stage first judges the teacher on them, and fails before it tries a layer if the teacher does not pass.
    """

    tasks: tuple[OneNeedle, ...] = Field(default=("niah_single_2", "niah_multikey_1"), min_length=1)
    """Used in turn, each at all of `recall.lengths`."""
    chat: bool = False
    """Put the prompt into a user message with the tokenizer's chat template; the answer prefix begins the reply."""
    least: float = Field(default=0.8, ge=0, le=1)
    """Share of the answers that the teacher must get right, all tokens of each by greedy choice."""

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("tasks has a task twice")
        return self


class AttentionChoice(Section):
    """`attention_layers: {count: N, choose: ...}`.

    even: the last layer and every (layers // count)-th layer before it. last: the last layers. Both are resolved when
    the run is planned. difficulty, recall: resolved by the `choose` stage after an align of all layers.
    """

    count: int = Field(gt=0, le=10_000)
    """Layers that stay attention. Source: HALO (2601.22156) keeps a quarter."""
    choose: Literal["even", "last", "difficulty", "recall"]
    """How they are found: `even`, `last`, both by the plan; `difficulty`, `recall`, both after an align of all
    layers."""
    difficulty: Difficulty = Difficulty()
    """Settings of `choose: difficulty`."""
    recall: RecallProbe = RecallProbe()
    """Settings of `choose: recall`."""
    probe: Annotated[NeedleProbe | None, AddedLater()] = None
    """Of recall: what the quiz documents are; None: facts, as in the text of `recall` sources, whoever fails them.
    Source: its needles are of RULER (2404.06654)."""
    search: Annotated[Search, AddedLater()] = "greedy"
    """Of recall. one_at_a_time: the layers that gain most alone. greedy: round by round, former choices restored.
    pairs: by what all pairs of the best layers gain (`model/convert/layer_search.py` has the rule)."""
    candidates: Annotated[int | None, AddedLater()] = Field(default=None, ge=1, le=10_000)
    """greedy: layers measured in each round after the first, those of the largest values known; None: all. pairs: the
    best layers alone, of which all pairs are measured; None: twice `count`, from 4 to 20."""

    @model_validator(mode="after")
    def _settings_are_used(self) -> Self:
        of_recall = {"probe": None, "search": "greedy", "candidates": None}
        if self.choose != "recall" and (given := [k for k, v in of_recall.items() if getattr(self, k) != v]):
            raise ValueError(f"`{given[0]}` is given, but `choose` is {self.choose}; remove it")
        for way, default in (("difficulty", Difficulty()), ("recall", RecallProbe())):
            if self.choose != way and getattr(self, way) != default:
                raise ValueError(f"settings of `{way}` are given, but `choose` is {self.choose}; remove them")
        return self

    @model_validator(mode="after")
    def _search_is_possible(self) -> Self:
        if self.candidates is not None and self.search == "one_at_a_time":
            raise ValueError("candidates is given, but search: one_at_a_time measures all layers once; remove it")
        pool = self.candidate_layers or 0
        if self.search == "pairs" and not 2 <= self.count <= pool <= _MOST_IN_PAIRS:
            raise ValueError(
                f"search: pairs chooses two layers or more among `candidates`, at most {_MOST_IN_PAIRS}, not "
                f"{self.count} among {pool}; change count or candidates, or use search: greedy"
            )
        return self

    @model_validator(mode="after")
    def _probe_has_a_haystack(self) -> Self:
        needing = [task for task in self.probe.tasks if task in _HAYSTACK_NEEDED] if self.probe else []
        if needing and not self.recall.haystack:
            raise ValueError(
                f"probe: {', '.join(needing)} hide needles in text, and there is none; name text files in "
                "recall.haystack, or list other probe.tasks (niah_single_1, niah_multikey_2)"
            )
        return self

    @property
    def candidate_layers(self) -> int | None:
        """`candidates`, with the default of `pairs`; None: all."""
        if self.search == "pairs" and self.candidates is None:
            return min(max(4, 2 * self.count), _MOST_IN_PAIRS)
        return self.candidates

    def passes(self, num_layers: int) -> int:
        """Maximum forward passes over the probe: the initial student, each set of layers, the teacher."""
        most = num_layers if self.candidate_layers is None else min(self.candidate_layers, num_layers)
        if self.search == "greedy":
            later = sum(min(most, num_layers - chosen) for chosen in range(1, self.count))
            return 1 + num_layers + later + self.count
        pairs = most * (most - 1) // 2 if self.search == "pairs" else 0
        return 1 + num_layers + pairs + 1 + (3 if pairs else 2)

    @property
    def after_align(self) -> bool:
        """Whether the layers are chosen after align."""
        return self.choose in ("difficulty", "recall")


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


def check_layers(student: Student) -> None:
    """Raises ValueError for listed layers that cannot be."""
    layers = listed_layers(student)
    if any(layer < 0 for layer in layers):
        raise ValueError(
            "attention_layers are counted from 0 and cannot be negative; use an empty list for a pure student"
        )
    if len(set(layers)) != len(layers):
        raise ValueError("attention_layers has a layer twice")


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
    """Raises ValueError if a choice after align or a calibration lacks its align stage or dataset, and where rotary
    positions are to fade that are not there, or stay."""
    student = recipe.student
    if student.attention_log_scale is not None and not student.attention_layers:  # a transplant may have none yet
        raise ValueError("attention_log_scale is for layers that stay attention, and attention_layers names none")
    choice = late_choice(recipe)
    if choice is not None and recipe.align is None:
        raise ValueError(
            f"student.attention_layers: choose: {choice.choose} needs an align stage, and the recipe has none; "
            "choose even or last, or list the layers"
        )
    if student.calibrate is not None and recipe.align is None:
        raise ValueError("student.calibrate needs an align stage, and the recipe has none; remove it")
    if recipe.distill is not None and recipe.distill.rope_fade is not None:
        _check_fade(student, recipe.distill)
    data = choice_data(recipe)
    if data is not None and data not in recipe.data:
        known = " and ".join(f"'{name}'" for name in recipe.data)
        raise ValueError(f"student.attention_layers.recall.data is '{data}', but `data` has {known}")


def _check_fade(student: Student, distill: Distill) -> None:
    if student.attention_rope:
        raise ValueError("distill.rope_fade takes rotary positions away, student.attention_rope keeps them; drop one")
    if not student.attention_layers:
        raise ValueError("distill.rope_fade is for layers that stay attention, and student.attention_layers names none")
    if distill.rope_fade is not None and distill.rope_fade.tokens > distill.tokens:
        raise ValueError(
            f"distill.rope_fade.tokens is {distill.rope_fade.tokens}, more than the stage has ({distill.tokens}): it "
            "would end with positions that its product does not have"
        )


def run_tokens(recipe: Recipe) -> int:
    """Tokens of all training stages: what the cost of a choice is a share of."""
    return sum(getattr(recipe, stage).seen_tokens for stage in recipe.training_stages)


def fit_probe(choice: AttentionChoice, *, num_layers: int, tokens: int) -> AttentionChoice:
    """Reduce the probe's documents and held-out tokens to its budget. tokens: training tokens of the run.

    Raises ValueError if the budget is too small.
    """
    probe, passes = choice.recall, choice.passes(num_layers)
    allowed = int(probe.budget * tokens) // passes
    if allowed >= probe.quiz_tokens + probe.heldout_tokens:
        return choice
    # Half of the tokens for each kind; one kind may use what the other does not need.
    documents = min(
        probe.documents, _documents_within(probe.lengths, max(allowed // 2, allowed - probe.heldout_tokens))
    )
    fitted = probe.model_copy(update={"documents": documents})
    windows = min(probe.heldout_tokens, allowed - fitted.quiz_tokens) // probe.context
    if windows < 1 or documents < _LEAST_DOCUMENTS:
        raise ValueError(
            f"choosing {choice.count} of {num_layers} layers by recall takes {passes} passes, and {probe.budget:.0%} "
            f"of the run's {tokens} tokens allow {allowed} tokens per pass, too few to compare layers; train on more "
            "tokens, shorten recall.lengths or recall.context, lower candidates, or choose even, last or difficulty"
        )
    fitted = fitted.model_copy(update={"heldout_tokens": windows * probe.context})
    return choice.model_copy(update={"recall": fitted})


def _documents_within(lengths: Sequence[int], tokens: int) -> int:
    """Number of documents, with lengths used in turn, that fit in a token count."""
    count = 0
    while tokens >= lengths[count % len(lengths)]:
        tokens -= lengths[count % len(lengths)]
        count += 1
    return count
