"""The objective of distill."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from radlads.kernels.linear_kl import linear_kl
from radlads.model.training.hidden_states import head_inputs
from radlads.model.training.objectives.base import Metrics, Objective
from radlads.model.training.settings import DistillSettings


class DistillObjective(Objective):
    """Stage 2: a KL between teacher and student over the vocabulary, at every position, with an optional cross entropy.

    In training the step's phase sets divergence, temperature and weights; in eval mode temperature is 1 and the rest
    the last phase's. Among the metrics `kl` is KL(teacher ‖ student) whatever trains, so that runs compare.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(self, section: DistillSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__(section, student, teacher)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        index, own = self.section.place(step)
        self._phase = self.section.parts[index]
        spikes = self._phase.ce_spikes
        spiked = spikes is not None and spikes.has(own)
        self._ce_weight = spikes.weight if spiked else self._phase.ce_weight

    def _settings(self) -> dict[str, Any]:
        """The current settings of the loss, in the form of linear_kl's argument."""
        if not self.training:
            last = self.section.parts[-1]
            return {"divergence": last.divergence, "kl_weight": last.kl_weight, "ce_weight": last.ce_weight}
        read = ("divergence", "temperature", "teacher_temperature", "l2wrap", "kl_weight")
        return {name: getattr(self._phase, name) for name in read} | {"ce_weight": self._ce_weight}

    def fixed_settings(self) -> Hashable:
        return tuple(self._settings().items())

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        tokens, rows = batch["input_ids"], self.rows(batch)
        teacher_state = self.teacher_hidden(tokens[:, :-1], **rows)
        hidden = self.student.hidden(tokens[:, :-1], **rows)
        loss, metrics = linear_kl(
            head_inputs(self.student, hidden).flatten(0, 1),
            self.student.get_output_embeddings().weight,
            head_inputs(self.teacher, teacher_state).flatten(0, 1),
            self.teacher.get_output_embeddings().weight,
            labels_N=tokens[:, 1:].flatten(),
            **self._settings(),
        )
        return loss, {"loss": loss.detach(), **metrics}
