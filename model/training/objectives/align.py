"""The objective of align."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radlads.model.training.align_losses import build_align_loss, no_spectrum
from radlads.model.training.objectives.base import Metrics, Objective
from radlads.model.training.probe import AttentionProbe
from radlads.model.training.settings import AlignSettings
from radlads.tasks.contracts.errors import UserError


class AlignObjective(Objective):
    """Stage 1: each mixer's output compared with its attention's, on the teacher's own inputs; only mixers train."""

    needs_teacher: ClassVar[bool] = True
    mixes_outside_layers: ClassVar[bool] = True

    def __init__(self, section: AlignSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__(section, student, teacher)
        self.layer_loss = build_align_loss(section, student.config.num_hidden_layers)
        if fault := no_spectrum(section, student.config.hidden_size):
            raise UserError(f"align: {fault}")

    def trainable(self, name: str) -> bool:
        return self.group(name) == "mixer"

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        input_ids = batch["input_ids"][:, :-1]
        cu_seqlens = self.bounds(batch)
        with AttentionProbe(self.teacher, self.student, loss=self.layer_loss, cu_seqlens=cu_seqlens) as probe:
            self.teacher_hidden(input_ids, cu_seqlens=cu_seqlens)
        losses = probe.losses
        if not losses:
            raise UserError("there is nothing to align: every layer stays softmax attention; drop the align stage")
        loss = torch.stack(list(losses.values())).mean()
        layers = {f"layer_{layer:02d}": value.detach() for layer, value in sorted(losses.items())}
        return loss, {"loss": loss.detach(), **layers}
