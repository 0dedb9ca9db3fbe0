"""Precision of frozen weights in memory, and the stages to which it applies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from radlads.tasks.contracts.recipe.training import Training, runs_teacher
from radlads.tasks.contracts.stages import stage_info

if TYPE_CHECKING:
    from radlads.tasks.contracts.recipe.sections import Recipe

FrozenBits = Literal[8, 16]
"""Bits of a frozen weight matrix: 16 is the precision of the stage, 8 is int8 with one scale per 128 values."""
MLP_PROJECTIONS = {"gate_proj", "up_proj", "down_proj", "gate_up_proj"}


def teacher_bits(recipe: Recipe, stage: str) -> FrozenBits:
    """Bits of the teacher's matrices in a training stage; 16 where the stage runs no teacher."""
    section: Training | None = getattr(recipe, stage)
    runs = section is not None and runs_teacher(stage, section)
    return recipe.teacher.bits if runs and recipe.teacher is not None else 16


def mlp_bits(recipe: Recipe, stage: str) -> FrozenBits:
    """Bits of the student's MLPs in a training stage; 16 where it trains them, and in a layerwise stage, which never
    runs them."""
    section = getattr(recipe, stage)
    holds = not stage_info(stage).layerwise and section is not None and freezes_mlp(stage, section)
    return recipe.student.mlp_bits if holds else 16


def freezes_mlp(stage: str, section: Training) -> bool:
    """Whether a training stage leaves the MLPs unchanged."""
    lora = getattr(section, "lora", None)
    if lora is not None:
        return not MLP_PROJECTIONS & set(lora.targets)
    return stage_info(stage).layerwise or "mlp" in section.freeze or bool(_train_only(section))


def frozen_groups(stage: str, section: Training) -> tuple[str, ...]:
    """The parameter groups that a stage does not change. Norms are ignored, because they are small."""
    everything = ("mlp", "embeddings", "head", "attention")
    if getattr(section, "lora", None) is not None:  # merging changes the adapted matrices
        return ("mlp", "embeddings", "head") if freezes_mlp(stage, section) else ("embeddings", "head")
    if stage_info(stage).layerwise or _train_only(section):
        return everything
    return tuple(group for group in everything if group in section.freeze)


def held_once(stage: str, section: Training, teacher_bits: FrozenBits, mlp_bits: FrozenBits) -> tuple[str, ...]:
    """The frozen groups whose memory student and teacher can share, because they have the same bits. In align the
    student does not run the shared groups, so their bits may differ."""
    theirs = {"mlp": teacher_bits, "attention": teacher_bits}
    ours = {"mlp": mlp_bits}
    return tuple(
        group
        for group in frozen_groups(stage, section)
        if stage_info(stage).layerwise or ours.get(group, 16) == theirs.get(group, 16)
    )


def _train_only(section: Training) -> tuple[str, ...]:
    only: tuple[str, ...] = section.train_only if hasattr(section, "train_only") else ()
    return only
