"""The objective of each training stage: (batch) -> (loss, metrics), and the parameters that it trains; see base.py."""

from __future__ import annotations

from transformers import PreTrainedModel

from radlads.model.training.objectives.align import AlignObjective
from radlads.model.training.objectives.base import Objective
from radlads.model.training.objectives.distill import DistillObjective
from radlads.model.training.objectives.next_token import ExtendObjective, NextTokenObjective
from radlads.model.training.settings import ObjectiveSettings

__all__ = ["OBJECTIVES", "Objective", "build_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    "align": AlignObjective,
    "distill": DistillObjective,
    "finetune": NextTokenObjective,
    "extend": ExtendObjective,
    "pretrain": NextTokenObjective,
}
"""Training stage → its objective."""


def build_objective(spec: ObjectiveSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Objective:
    """The objective of a training stage. Raises UserError for settings that contradict the model."""
    return OBJECTIVES[spec.objective](spec.section, student, teacher)
