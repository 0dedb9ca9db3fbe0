"""The objectives that learn from text: of finetune, extend and pretrain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from radlads.kernels.linear_kl import linear_ce
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.training.hidden_states import head_inputs, plain_hidden
from radlads.model.training.objectives.base import Metrics, Objective
from radlads.model.training.settings import ExtendSettings, HasLabelChoices
from radlads.tasks.contracts.errors import UserError

_IGNORED = -100


class NextTokenObjective(Objective):
    """Stage 3 and pretraining: next-token cross entropy, optionally over the assistant's tokens alone."""

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        tokens = batch["input_ids"]
        labels = tokens[:, 1:]
        counts = self._counts(batch)
        if counts is not None:
            labels = labels.masked_fill(~counts, _IGNORED)
        rows = self.rows(batch)
        if isinstance(self.student, RadladsForCausalLM):
            hidden = self.student.hidden(tokens[:, :-1], **rows)
        else:
            hidden = plain_hidden(self.student, tokens[:, :-1], **rows)
        loss, metrics = linear_ce(
            head_inputs(self.student, hidden).flatten(0, 1),
            self.student.get_output_embeddings().weight,
            labels.flatten(),
            label_smoothing=self.section.label_smoothing if isinstance(self.section, HasLabelChoices) else 0.0,
        )
        return loss, {"loss": loss.detach(), "ce": metrics["ce"], "accuracy": metrics["accuracy"]}

    def num_labels(self, batch: Mapping[str, Tensor]) -> int:
        counts = self._counts(batch)
        return super().num_labels(batch) if counts is None else int(counts.sum())

    def _counts(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Whether each label [B,T] counts; None if all do."""
        if not (isinstance(self.section, HasLabelChoices) and self.section.assistant_only):
            return None
        if "loss_mask" not in batch:
            raise UserError(
                "assistant_only needs chat data: this dataset has no mask; set `messages_field` of its sources"
            )
        return batch["loss_mask"][:, 1:].bool()


class ExtendObjective(NextTokenObjective):
    """Stage 4: next-token cross entropy, in phases with `teacher_kl` plus the KL to the teacher over the same tokens.

    In eval mode it has the last phase's weight.
    """

    def __init__(self, section: ExtendSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__(section, student, teacher)
        if section.asks_teacher and teacher is None:
            raise ValueError("ExtendObjective needs a teacher where a phase has teacher_kl")
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        self._kl_weight = self.section.parts[self.section.place(step)[0]].teacher_kl

    def fixed_settings(self) -> Hashable:
        return self._kl_weight if self.training else self.section.parts[-1].teacher_kl

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        kl_weight: Any = self.fixed_settings()
        if kl_weight == 0:
            return super().forward(batch)
        tokens, counts, rows = batch["input_ids"], self._counts(batch), self.rows(batch)
        expected = self.teacher_hidden(tokens[:, :-1], **rows)
        hidden = self.student.hidden(tokens[:, :-1], **rows)
        weight_N = None if counts is None else counts.flatten().float()
        return self.compare(hidden, expected, tokens[:, 1:], weight_N=weight_N, kl_weight=kl_weight, ce_weight=1.0)
