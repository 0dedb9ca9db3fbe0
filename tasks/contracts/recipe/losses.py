"""The training stages of a recipe: their losses and defaults."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import AddedLater, Place, Reads
from radlads.tasks.contracts.recipe.loss_terms import Average, CeSpikes, Comprehensive, Lora, RopeFade
from radlads.tasks.contracts.recipe.memory import MLP_PROJECTIONS
from radlads.tasks.contracts.recipe.training import MixedRows, PhasedTraining, Rate, Schedule, Training, TrainingPhase
from radlads.tasks.contracts.recipe.watch import NO_ROLLBACK, Rollback, Watch


class Align(Training):
    """Stage 1: teacher-forced regression of each mixer's output on its attention's output (2505.03005, §3)."""

    mixer_rate: Rate = Rate(start=1e-3, final=1e-5)
    """Learning rate of the mixers. Source: RADLADS (2505.03005), table 2."""
    rest_rate: Rate = Rate(start=0.0, final=0.0)
    """Nothing else trains in this stage."""
    loss: Literal["l2", "mse", "comprehensive", "scaled_mse"] = "l2"
    """Equations: model/training/align_losses.py. l2: RADLADS; mse: HALO, hxa079; comprehensive: cxa073; scaled_mse:
    hxa07c. Source: RADLADS (2505.03005)."""
    comprehensive: Comprehensive = Comprehensive()
    """Weights of `loss: comprehensive`."""

    @model_validator(mode="after")
    def _rows_are_whole(self) -> Self:
        if self.sequence_parallel > 1:
            raise ValueError("align compares outputs over whole rows; leave sequence_parallel out of it")
        return self

    @model_validator(mode="after")
    def _weights_are_used(self) -> Self:
        if self.loss != "comprehensive" and self.comprehensive != Comprehensive():
            raise ValueError("`comprehensive` sets the weights of `loss: comprehensive`, but another loss is selected")
        return self


class DistillRollback(Rollback):
    """Rollback, with CE spikes from there on, in place of those of the stage and its phases."""

    ce_spikes: CeSpikes | None = None
    """Of the steps after a rollback; None: the stage's own."""

    @property
    def changes_something(self) -> bool:
        return super().changes_something or self.ce_spikes is not None


class DistillWatch(Watch):
    """Watch of distill."""

    rollback: DistillRollback = DistillRollback()


Divergence = Literal["forward", "reverse", "jsd"]
_BETA = 0.5


class Phase(TrainingPhase):
    """One part of a distill stage."""

    divergence: Annotated[Divergence | None, AddedLater()] = None
    jsd_beta: Annotated[float | None, AddedLater()] = Field(default=None, ge=1e-3, le=0.999)
    temperature: float | None = Field(default=None, gt=0)
    teacher_temperature: float | None = Field(default=None, gt=0)
    kl_weight: float | None = Field(default=None, ge=0)
    ce_weight: float | None = Field(default=None, ge=0)
    ce_spikes: CeSpikes | None = None
    hidden_weight: Annotated[float | None, AddedLater()] = Field(default=None, ge=0)


class Distill(PhasedTraining):
    """Stage 2: a KL between teacher and student of the logits."""

    mixer_rate: Rate = Rate(start=1e-5, final=1e-5)
    """Learning rate of the mixers. Higher ones are published since: 1e-4 at 1.7B, 5e-5 at 4B, 3e-5 at 8B (2601.22156).
    Source: RADLADS (2505.03005), table 2."""
    rest_rate: Rate = Rate(start=1e-5, final=1e-5)
    """Learning rate of everything else that trains. Source: RADLADS (2505.03005), table 2."""
    schedule: Schedule = Schedule(kind="constant")
    """How the rates go from `start` to `final`. Source: RADLADS (2505.03005), table 2."""
    divergence: Annotated[Divergence, AddedLater()] = "forward"
    """forward: KL(teacher ‖ student). reverse: KL(student ‖ teacher) (2306.08543), which a student with too little
    capacity for all of the teacher's modes meets by dropping some. jsd: the generalized Jensen-Shannon divergence
    (2306.13649) β KL(teacher ‖ m) + (1 − β) KL(student ‖ m), m = β teacher + (1 − β) student. Held-out `kl` is the
    forward one in all cases. Source: MiniLLM (2306.08543), GKD (2306.13649)."""
    jsd_beta: Annotated[float, AddedLater()] = Field(default=_BETA, ge=1e-3, le=0.999)
    """β of jsd, from 0.001 to 0.999: beyond, the mixture is one of the two, and float32 loses the other."""
    temperature: float = Field(default=1.0, gt=0)
    """τ of teacher and student; the KL is multiplied by τ². Held-out losses use τ = 1. Source: cxa073 has it."""
    teacher_temperature: float | None = Field(default=None, gt=0)
    """τ of the teacher alone, with student τ = 1 and no factor τ²; this changes the target, unlike classical KD.
    Source: RWKVInside from May 2025 on."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of the KL."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross entropy beside it. Source: 0.05 in RWKVInside's Mistral and Phi configs."""
    ce_spikes: CeSpikes | None = None
    """Steps whose cross entropy has a weight of its own; null: none. Source: cxa073 has them."""
    l2wrap: float = Field(default=0.0, ge=0)
    """RWKV's L2Wrap: adds l2wrap·z to the gradient of the largest logit z of each position; not included in the
    reported loss. Source: cxa073 has 1e-4."""
    average: Annotated[Average | None, AddedLater()] = None
    """Export an average of the weights; null: the last ones."""
    hidden_weight: Annotated[float, AddedLater()] = Field(default=0.0, ge=0)
    """Weight of the mean over layers and tokens of ‖h − t‖² / ‖t‖², h and t the residual streams of student and teacher
    after a decoder layer. Holds all of the teacher's t from its pass to the student's backward pass."""
    lora: Lora | None = None
    """Train low-rank updates instead of the projections; null: the projections. Source: cxa073, stage 3, has it."""
    rope_fade: Annotated[RopeFade | None, AddedLater()] = None
    """None: `student.attention_rope: false` takes the positions away before the first step."""
    phases: tuple[Phase, ...] = ()
    watch: Annotated[DistillWatch, NO_ROLLBACK] = DistillWatch()

    @property
    def parts(self) -> tuple[Training, ...]:
        """The phases; one without jsd has not the stage's `jsd_beta`, which says nothing there."""
        parts = super().parts
        if not self.phases or self.jsd_beta == _BETA:
            return parts
        plain = {"jsd_beta": _BETA}
        return tuple(part if _has_jsd(part) else part.model_copy(update=plain) for part in parts)

    def has_ce_spike(self, step: int) -> bool:
        index, own = self.place(step)
        part = self.parts[index]
        spikes = part.ce_spikes if isinstance(part, Distill) else None
        return spikes is not None and spikes.every > 1 and spikes.has(own)

    def rope_factor(self, step: int) -> float:
        """By which an optimizer step, counted from 0, multiplies the rotary angles of kept layers."""
        if self.rope_fade is None:
            return 0.0
        seen = 0
        for part in self.parts:
            seen += min(step, part.own_steps) * part.batch * part.context
            step -= min(step, part.own_steps)
        return max(0.0, 1 - seen / self.rope_fade.tokens)

    @property
    def evidence_steps(self) -> int:
        spikes = (self.ce_spikes, self.watch.rollback.ce_spikes, *(phase.ce_spikes for phase in self.phases))
        return super().evidence_steps * (2 if any(spikes) else 1)  # up to every second step is left out

    def after_rollbacks(self, count: int) -> Self:
        slowed, spikes = super().after_rollbacks(count), self.watch.rollback.ce_spikes
        if not count or spikes is None:
            return slowed
        phases = tuple(phase.model_copy(update={"ce_spikes": spikes}) for phase in slowed.phases)
        return slowed.model_copy(update={"ce_spikes": spikes, "phases": phases})

    @model_validator(mode="after")
    def _one_temperature(self) -> Self:
        if self.teacher_temperature is not None and self.temperature != 1:
            raise ValueError(
                "give temperature (of teacher and student) or teacher_temperature (of the teacher alone), not both"
            )
        return self

    @model_validator(mode="after")
    def _beta_is_of_jsd(self) -> Self:
        told = "jsd_beta is of the divergence jsd, which is not set; set divergence to jsd, or leave jsd_beta out"
        if self.jsd_beta != _BETA and not any(map(_has_jsd, self.parts)):
            raise ValueError(told)
        for number, (phase, part) in enumerate(zip(self.phases, self.parts, strict=False), 1):
            if phase.jsd_beta is not None and not _has_jsd(part):
                raise ValueError(f"phase {number}: {told}")
        return self

    @model_validator(mode="after")
    def _lora_fits(self) -> Self:
        _check_lora(self, self.lora)
        return self


def _has_jsd(part: Training) -> bool:
    return isinstance(part, Distill) and part.divergence == "jsd"


class NextTokenTraining(Training):
    """Next-token cross entropy of the student, from text alone."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of a label's probability that is spread over the whole vocabulary. Source: cxa073, stage 3, has it."""
    assistant_only: bool = False
    """Chat data: only assistant tokens are labels. A step without any is an error."""
    train_only: tuple[Literal["mixer", "decay", "token_shift"], ...] = ()
    """Train only these parts of the mixers; empty: everything except `freeze`. `[decay, token_shift]` is step 3a of
    2505.03005, which reduces memory at long contexts. Source: RADLADS (2505.03005), step 3a."""
    lora: Lora | None = None
    """Train low-rank updates instead of the projections; null: the projections. Source: cxa073, stage 3, has it."""

    @model_validator(mode="after")
    def _lora_fits(self) -> Self:
        if self.lora is not None and self.train_only:
            raise ValueError("train_only and lora cannot be combined; remove one of them")
        _check_lora(self, self.lora)
        return self


class Finetune(NextTokenTraining):
    """Stage 3: next-token cross entropy."""

    mixer_rate: Rate = Rate(start=1e-5, final=1e-5)
    """Learning rate of the mixers. Source: RADLADS (2505.03005), table 2."""
    rest_rate: Rate = Rate(start=1e-5, final=1e-5)
    """Learning rate of everything else that trains. Source: RADLADS (2505.03005), table 2."""
    schedule: Schedule = Schedule(kind="constant")
    """How the rates go from `start` to `final`. Source: RADLADS (2505.03005), table 2."""


class ExtendPhase(TrainingPhase):
    """One part of an extend stage, at a longer context than the one before it."""

    teacher_kl: float | None = Field(default=None, ge=0)


class Extend(PhasedTraining, NextTokenTraining):
    """Stage 4: next-token cross entropy at longer contexts, which grow from phase to phase."""

    mixer_rate: Rate = Rate(start=1e-5, final=1e-5)
    """Learning rate of the mixers. Source: that of finetune."""
    rest_rate: Rate = Rate(start=1e-5, final=1e-5)
    """Learning rate of everything else that trains. Source: that of finetune."""
    schedule: Schedule = Schedule(kind="constant")
    """How the rates go from `start` to `final`."""
    phases: tuple[ExtendPhase, ...] = ()
    recall: MixedRows | None = None
    """Recall text among the rows: a dataset with a source of kind `recall`, whose `lengths` say how far facts lie
    apart from their questions."""
    teacher_kl: float = Field(default=0.0, ge=0)
    """Weight of KL(teacher ‖ student) beside the cross entropy, over the same tokens; 0: the stage loads no teacher."""

    @property
    def mixed(self) -> MixedRows | None:
        return self.recall

    @property
    def asks_teacher(self) -> bool:
        return any(part.teacher_kl > 0 for part in self.parts if isinstance(part, Extend))

    @model_validator(mode="after")
    def _contexts_grow(self) -> Self:
        contexts = [part.context for part in self.parts]
        for number, (before, after) in enumerate(itertools.pairwise(contexts), 2):
            if after <= before:
                raise ValueError(f"contexts grow from phase to phase, but phase {number} has {after} after {before}")
        return self

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.label_smoothing and self.asks_teacher:
            raise ValueError("label_smoothing and teacher_kl both soften the labels; give one of them")
        return self


class Pretrain(Training):
    """Train a small teacher from random weights with the same loop; the flow `radlads-pretrain`."""

    config: dict[str, Any]
    """A Hugging Face config (model_type and its fields)."""
    tokenizer: Annotated[Place, Reads("tokenizer")]
    """Folder or hub id of the tokenizer."""
    mixer_rate: Rate = Rate(start=1e-3, final=1e-4)
    """Unused: a teacher has no mixers."""
    rest_rate: Rate = Rate(start=1e-3, final=1e-4)
    """Learning rate of all parameters."""
    schedule: Schedule = Schedule(kind="cosine")
    """How the rate goes from `start` to `final`."""


def _check_lora(section: Training, lora: Lora | None) -> None:
    adapted = sorted(MLP_PROJECTIONS & set(lora.targets)) if lora else []
    if adapted and "mlp" in section.freeze:
        raise ValueError(f"lora.targets has {adapted[0]}, but freeze has mlp")
