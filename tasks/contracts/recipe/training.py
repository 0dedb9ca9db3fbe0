"""Settings that all training stages share: sizes, rates, optimizer, schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, AddedLater, Section, Seed
from radlads.tasks.contracts.recipe.watch import NO_ROLLBACK, Watch
from radlads.tasks.contracts.stages import stage_info


class Rate(Section):
    """Learning rate of a parameter group, from `start` to `final` along the schedule. Adam moves a weight by about the
    rate in every step, and weights are much smaller than 1."""

    start: float = Field(ge=0, le=1)
    """At the first step, after the warm-up."""
    final: float = Field(ge=0, le=1)
    """At the last step."""


class Optimizer(Section):
    """AdamW. Defaults are RADLADS's (2505.03005, table 2): betas .9/.95, eps 1e-8, no weight decay, clip 1."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment. Source: RADLADS (2505.03005), table 2."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment. Source: RADLADS (2505.03005), table 2."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment. Source: RADLADS (2505.03005), table 2."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Applied to tensors with at least two dimensions larger than one (matrices, low-rank factors, the bonus), not to
    norms, biases and per-channel vectors. Source: RADLADS's program."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient. Source: RADLADS's program."""
    decay_base_rate: float = Field(default=1.0, gt=0)
    """Learning-rate multiplier of the decay base (w0, time_decay). Source: 2 in the hxa079 runs."""


class Schedule(Section):
    """Learning-rate schedule over a stage's optimizer steps.

    q in [0, 1] is the progress. `quarter_cosine` is from the RADLADS code: final + (start − final)·cos(π q / 2).
    `cosine` is the usual half cosine. `stable_cosine_stable` (RADLADS step 2a) holds `start`, follows the quarter
    cosine between `begin` and `end` (fractions of the steps; published: .833 and .875), then holds `final`. `linear`
    interpolates linearly, `exponential` is start·(final / start)^q, `constant` stays at `start`.
    """

    kind: Literal["quarter_cosine", "cosine", "stable_cosine_stable", "linear", "exponential", "constant"] = (
        "quarter_cosine"
    )
    """The curve; formulas above. Source: RADLADS's program for `quarter_cosine`."""
    warmup_steps: int = Field(default=50, ge=0)
    """Linear from 1 % to 100 % of the scheduled rate; limited to a tenth of the steps. Source: RADLADS's program."""
    begin: float = Field(default=0.0, ge=0, le=1)
    """Of `stable_cosine_stable`: where the rate begins to fall, as a fraction of the steps. Source: 0.833 in RADLADS
    step 2a."""
    end: float = Field(default=1.0, ge=0, le=1)
    """Of `stable_cosine_stable`: where it has reached `final`. Source: 0.875 in RADLADS step 2a."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.begin >= self.end:
            raise ValueError("schedule.begin must be smaller than schedule.end")
        return self


_HELDOUT_SHARE = 20
"""Training tokens to a held-out one along the way."""


class MixedRows(Section):
    """Rows of a second dataset among a stage's own, spread evenly."""

    data: str
    """Name of an entry of the recipe's `data`."""
    share: float = Field(default=0.1, ge=1e-4, le=0.9)
    """Of the stage's rows, and so of its tokens."""


class Training(Section):
    """Settings that all training stages share."""

    data: str = "train"
    """Name of an entry of the recipe's `data`."""
    tokens: int = Field(gt=0)
    """Trained on, of all phases; rounded down to whole steps."""
    context: int = Field(gt=1)
    """Sequence length in tokens."""
    batch: int = Field(gt=0)
    """Sequences per optimizer step, over all processes and accumulation steps."""
    micro_batch: Annotated[int, OPERATIONAL] = Field(default=1, gt=0)
    """Sequences per forward pass of one process. Not in the digest: it changes memory, not the result, because the
    loss is normalised by the labels of the whole optimizer step."""
    mixer_rate: Rate
    """Learning rate of the mixers."""
    rest_rate: Rate
    """Learning rate of everything else that trains."""
    optimizer: Optimizer = Optimizer()
    """Settings of AdamW."""
    schedule: Schedule = Schedule()
    """How the rates go from `start` to `final`."""
    freeze: tuple[Literal["embeddings", "head", "norms", "final_norm", "mlp", "attention"], ...] = ()
    """Parameter groups that do not train. `attention`: the attention layers; `norms` includes the final norm."""
    gradient_checkpointing: Annotated[bool | Literal["selective"], OPERATIONAL] = False
    """Compute activations again in the backward pass. true: every layer's, from its input. selective: what is cheap, in
    RWKV-7 mixers and Llama MLPs; a layer keeps about half as much, and no projection runs twice."""
    sequence_parallel: Annotated[int, OPERATIONAL] = Field(default=1, ge=1)
    """Consecutive processes that share rows, each with as many consecutive tokens of every row: contexts that are too
    long for the memory of one. Not in the digest: the result is the same up to rounding."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 with fp32 masters on a GPU, fp32 on a CPU. Source: RADLADS."""
    decay_dtype: Annotated[Literal["auto", "float32", "bfloat16"], AddedLater(made_with="float32")] = "auto"
    """Of the log decay that RWKV-7's recurrence is given in training; auto: the stage's precision, as in RWKV's own
    kernels and fla's. The kernels for Hopper GPUs take 16 bits; an exported model computes it in float32."""
    seed: Seed = 1337
    """Of the order of the rows and of torch's random numbers. Source: RADLADS's program."""
    checkpoint_every: Annotated[int, OPERATIONAL] = Field(default=500, gt=0)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Annotated[int, OPERATIONAL] = Field(default=2, ge=1)
    """How many of the newest are kept."""
    heldout_every: Annotated[int | None, OPERATIONAL] = Field(default=None, ge=0)
    """Optimizer steps between held-out evaluations; 0: only at the end. None: ten along the way, or fewer, so that they
    read at most a twentieth of the tokens that train."""
    heldout_tokens: int = Field(default=16384, gt=0)
    """Of the held-out text that is scored on the way and at the end."""
    reset_at_documents: bool = False
    """Reset the recurrent state and mask attention at document boundaries. Off in the published runs. Source:
    RADLADS."""
    watch: Annotated[Watch, NO_ROLLBACK] = Watch()
    """What is done when training goes wrong."""

    @property
    def parts(self) -> tuple[Training, ...]:
        """The phases in order, each as a section without phases; the section itself if it has none."""
        return (self,)

    @property
    def asks_teacher(self) -> bool:
        """Whether it asks for the teacher in a stage that can do without."""
        return False

    @property
    def mixed(self) -> MixedRows | None:
        """What is mixed in among the rows of its own dataset."""
        return None

    @property
    def datasets(self) -> dict[str, str]:
        """Input of the stage's job → name of the dataset: `data`, and `mixed_data` where rows are mixed in."""
        return {"data": self.data} | ({} if self.mixed is None else {"mixed_data": self.mixed.data})

    @property
    def num_steps(self) -> int:
        """Optimizer steps, over all parts."""
        return sum(part.own_steps for part in self.parts)

    @property
    def heldout_interval(self) -> int:
        """Optimizer steps between held-out evaluations; 0: only at the end."""
        if self.heldout_every is not None:
            return self.heldout_every
        times = min(10, self.seen_tokens // (_HELDOUT_SHARE * self.heldout_tokens))
        return -(-self.num_steps // times) if times else 0

    @property
    def own_steps(self) -> int:
        """Optimizer steps of a section without phases."""
        return max(1, self.tokens // (self.batch * self.context))

    @property
    def seen_tokens(self) -> int:
        """Tokens that are trained on: `tokens` rounded to whole steps."""
        return sum(part.own_steps * part.batch * part.context for part in self.parts)

    def place(self, step: int) -> tuple[int, int]:
        """(index of the part, step within it) of an optimizer step, all from 0."""
        for index, part in enumerate(self.parts):
            if step < part.own_steps:
                return index, step
            step -= part.own_steps
        raise ValueError("the step is beyond the last step of the stage")

    def begins_anew(self, index: int) -> bool:
        """Whether a part starts with a new optimizer state; always true for the first part."""
        return index == 0

    def has_ce_spike(self, step: int) -> bool:
        """Whether an optimizer step (from 0) has a loss of its own, unlike its neighbours'."""
        return False

    @property
    def evidence_steps(self) -> int:
        """The most steps that separate the first sign of a fault from the step that rolls back for it."""
        return self.watch.evidence_steps

    def after_rollbacks(self, count: int) -> Self:
        """The section by which training goes on after `count` rollbacks."""
        return _slowed(self, self.watch.rollback.rate_factor**count) if count else self

    @property
    def longest_context(self) -> int:
        """The longest context of all parts, in tokens."""
        return max(part.context for part in self.parts)

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        if self.context % self.sequence_parallel:
            raise ValueError(
                f"context ({self.context}) must be a multiple of sequence_parallel ({self.sequence_parallel}): that "
                "many processes share a row in equal parts"
            )
        return self

    @model_validator(mode="after")
    def _rates_fit_the_schedule(self) -> Self:
        rates = (self.mixer_rate, self.rest_rate)
        if self.schedule.kind == "exponential" and any((rate.start == 0) != (rate.final == 0) for rate in rates):
            raise ValueError("an exponential schedule cannot start or end at a rate of 0")
        return self


def runs_teacher(stage: str, section: Training) -> bool:
    """Whether a training stage, or a part of one, runs the teacher: the stage always does, or its section asks."""
    return stage_info(stage).needs_teacher or section.asks_teacher


class TrainingPhase(Section):
    """One part of a stage that has phases; what it does not say is the stage's own."""

    tokens: int = Field(gt=0)
    context: int | None = Field(default=None, gt=1)
    batch: int | None = Field(default=None, gt=0)
    micro_batch: Annotated[int | None, OPERATIONAL] = Field(default=None, gt=0)
    mixer_rate: Rate | None = None
    rest_rate: Rate | None = None
    schedule: Schedule | None = None
    """Over this phase's steps, warm-up included."""
    fresh_optimizer: bool = False
    """Begin with Adam as new, as the published runs did by restarting from weights; else its moments go on."""

    @property
    def changes(self) -> dict[str, Any]:
        """The settings of the stage that it replaces."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "fresh_optimizer"}
        return {name: value for name, value in given.items() if value is not None}


class PhasedTraining(Training):
    """A stage that may have parts with settings of their own: one curve, and one place to resume from."""

    phases: tuple[TrainingPhase, ...] = ()
    """One after the other; their tokens add up to `tokens`. Held-out losses are in the last one's context throughout.
    Source: the published Reka runs have phases."""

    @property
    def parts(self) -> tuple[Training, ...]:
        """The phases, each as a section of the stage of its own."""
        if not self.phases:
            return (self,)
        return tuple(self.model_copy(update={**phase.changes, "phases": ()}) for phase in self.phases)

    def after_rollbacks(self, count: int) -> Self:
        factor = self.watch.rollback.rate_factor**count
        phases = tuple(_slowed(phase, factor) for phase in self.phases)
        return super().after_rollbacks(count).model_copy(update={"phases": phases}) if count else self

    def begins_anew(self, index: int) -> bool:
        return super().begins_anew(index) or self.phases[index].fresh_optimizer

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if not self.phases:
            return self
        total = sum(phase.tokens for phase in self.phases)
        if total != self.tokens:
            raise ValueError(f"tokens is {self.tokens}, but the phases' tokens add up to {total}")
        for number, part in enumerate(self.parts, 1):
            try:
                type(self).model_validate(part.model_dump())
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"phase {number}: {message}") from None
        return self


_Rated = TypeVar("_Rated", bound=Section)


def _slowed(section: _Rated, factor: float) -> _Rated:
    """The section with its own rates multiplied. All schedules are linear in the rates."""
    rates = {name: getattr(section, name) for name in ("mixer_rate", "rest_rate")}
    slower = {
        name: Rate(start=factor * rate.start, final=factor * rate.final)
        for name, rate in rates.items()
        if rate is not None
    }
    return section.model_copy(update=slower)
