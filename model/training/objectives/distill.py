"""The objective of distill."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radlads.model.student.forward_pass import ROPE_FACTOR
from radlads.model.training.objectives.base import Metrics, Objective
from radlads.model.training.objectives.hidden_distance import HiddenDistance, check_comparable
from radlads.model.training.settings import DistillSettings
from radlads.tasks.contracts.errors import UserError

_ALWAYS = ("divergence", "jsd_beta", "kl_weight", "hidden_weight")
"""Settings of a phase that hold in eval mode as well."""


class DistillObjective(Objective):
    """Stage 2: a KL between teacher and student over the vocabulary, at every position; optionally a cross entropy, and
    the distance of the hidden states after every layer.

    In training the step's phase sets divergence, temperature and weights; in eval mode temperature is 1 and the rest
    the last phase's. With `rope_fade` kept layers have faded rotary positions in training, and none in eval mode. Among
    the metrics `kl` is KL(teacher ‖ student) whatever trains, so that runs compare.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(self, section: DistillSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__(section, student, teacher)
        if any(part.hidden_weight for part in section.parts):
            check_comparable(student, self.teacher)
        factor = None if section.rope_fade is None else torch.ones(())
        if factor is not None and (student.config.attention_rope or not student.config.attention_layers):
            raise UserError(
                "rope_fade needs softmax layers that lose their rotary positions, and this student has none"
            )
        self.register_buffer("rope_factor", factor, persistent=False)  # changed in place: a recorded pass reads it
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        if self.rope_factor is not None:
            self.rope_factor.fill_(self.section.rope_factor(step))
        index, own = self.section.place(step)
        self._phase = self.section.parts[index]
        spikes = self._phase.ce_spikes
        spiked = spikes is not None and spikes.has(own)
        self._ce_weight = spikes.weight if spiked else self._phase.ce_weight

    def _settings(self) -> dict[str, Any]:
        """The current settings of the loss: `hidden_weight`, and the rest in the form of linear_kl's arguments."""
        if not self.training:
            last = self.section.parts[-1]
            return {name: getattr(last, name) for name in (*_ALWAYS, "ce_weight")}
        read = (*_ALWAYS, "temperature", "teacher_temperature", "l2wrap")
        return {name: getattr(self._phase, name) for name in read} | {"ce_weight": self._ce_weight}

    def fixed_settings(self) -> Hashable:
        return tuple(self._settings().items())

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        tokens, rows, settings = batch["input_ids"], self.rows(batch), self._settings()
        hidden_weight = settings.pop("hidden_weight")
        distance = HiddenDistance() if hidden_weight else None
        with nullcontext() if distance is None else distance.watch_teacher(self.teacher):
            teacher_state = self.teacher_hidden(tokens[:, :-1], **rows)
        if self.training and self.rope_factor is not None:
            rows[ROPE_FACTOR] = self.rope_factor
        with nullcontext() if distance is None else distance.watch_student(self.student):
            hidden = self.student.hidden(tokens[:, :-1], **rows)
        loss, metrics = self.compare(hidden, teacher_state, tokens[:, 1:], **settings)
        if distance is not None:
            mean = distance.mean()
            loss, metrics = loss + hidden_weight * mean, metrics | {"hidden": mean.detach()}
        return loss, metrics | {"loss": loss.detach()}
