"""The objective of each training stage: (batch) -> (loss, metrics), and the parameters that it trains.

Loss and metrics of a batch are means over its labels, which `Objective.num_labels` counts: code that combines batches
(tasks/jobs/train: engines, heldout.py) weights each by its labels, so the result does not depend on the batch division.

Dims: B batch, T context, D model width, N = B·T tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from radlads.kernels.linear_kl import linear_ce, linear_kl
from radlads.model.sequence_parallel.attention import exchange_heads
from radlads.model.sequence_parallel.row_part import row_part
from radlads.model.student.documents import document_bounds
from radlads.model.student.forward_pass import ROPE_FACTOR
from radlads.model.student.modeling import RadladsForCausalLM, parameter_group
from radlads.model.student.precision import remember_buffers, restore_buffers
from radlads.model.teacher.family import NO_RESTART
from radlads.model.training.align_losses import build_align_loss, no_spectrum
from radlads.model.training.hidden_states import family_parts, head_inputs, plain_hidden
from radlads.model.training.lora import lora_trains
from radlads.model.training.mixer_parts import mixer_parts
from radlads.model.training.probe import AttentionProbe
from radlads.model.training.settings import (
    AlignSettings,
    DistillSettings,
    ExtendSettings,
    HasLabelChoices,
    HasLora,
    HasTrainOnly,
    ObjectiveSettings,
    SectionSettings,
)
from radlads.tasks.contracts.errors import UserError

Metrics = dict[str, Tensor]
_IGNORED = -100


class Objective(nn.Module):
    """Base. The student is the submodule `student`, so its parameters are named `student.<name>`; the teacher is not a
    submodule.

    A batch holds `input_ids` [B,T+1] int64, and where they apply `loss_mask` [B,T+1] bool (True where the token counts
    as a label) and `document_ids` [B,T+1] int. Inputs are [:, :-1] and labels [:, 1:]: the single shift. Where ranks
    share rows, T is this rank's part of them, but of `document_ids`, which are those of whole rows.
    """

    needs_teacher: ClassVar[bool] = False
    mixes_outside_layers: ClassVar[bool] = False
    """Whether the student's mixers are called by `mix`, without their layers."""

    def __init__(self, section: SectionSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__()
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        self.section = section
        self.student = student
        # In a tuple, so that it is neither saved, moved nor trained with the student.
        self._teacher = (teacher,)
        self._frozen = frozenset(section.freeze)
        self._row_group: distributed.ProcessGroup | None = None
        if section.reset_at_documents and getattr(family_parts(student), "linear_attention", None):
            raise UserError(f"reset_at_documents: {NO_RESTART}")
        if student.config.tie_word_embeddings and len(self._frozen & {"embeddings", "head"}) == 1:
            raise UserError("the head is the embedding matrix (tied): freeze both `embeddings` and `head`, or neither")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = remember_buffers(self)
        super()._apply(fn, recurse)
        restore_buffers(kept)
        return self

    @property
    def teacher(self) -> PreTrainedModel:
        teacher = self._teacher[0]
        assert teacher is not None, "checked on construction"
        return teacher

    def share_rows(self, group: distributed.ProcessGroup, context: int) -> None:
        """From now on each rank of the group has its part of the same rows, of at most `context` tokens (sequence
        parallelism). Raises UserError for networks that exclude it."""
        self._row_group = group
        for network in filter(None, (self.student, *self._teacher)):
            exchange_heads(network, group.size(), context)

    def begin_step(self, step: int) -> None:
        """Called before every optimizer step (counted from 0), for objectives that change during training."""

    def fixed_settings(self) -> Hashable:
        """The values that `forward` reads of what changes between steps: passes with equal ones run the same kernels
        with the same constants."""
        return None

    def trainable(self, name: str) -> bool:
        """Whether a parameter of the student trains; `name` as in `student.named_parameters()`."""
        group = self.group(name)
        if isinstance(self.section, HasLora) and self.section.lora is not None:
            adapted = lora_trains(self.student, name)
            return group == "mixer" if adapted is None else adapted
        only = set(self.section.train_only) if isinstance(self.section, HasTrainOnly) else set()
        if only:
            return group == "mixer" and bool(only & mixer_parts(name))
        return group not in self._frozen and not ("final_norm" in self._frozen and self._of_final_norm(name))

    def group(self, name: str) -> str:
        """mixer, attention, mlp, norms, embeddings or head."""
        if isinstance(self.student, RadladsForCausalLM):
            return self.student.parameter_group(name)
        return parameter_group(name, family_parts(self.student), set())

    def _of_final_norm(self, name: str) -> bool:
        parts, words = family_parts(self.student), name.split(".")
        return parts.final_norm in words and parts.layers not in words

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        """`(scalar fp32 loss, detached metrics)`: means over the batch's labels, 0 where it has none."""
        raise NotImplementedError

    def num_labels(self, batch: Mapping[str, Tensor]) -> int:
        """Number of tokens of a batch (on the CPU) that `forward` averages over: all predicted ones."""
        return batch["input_ids"][:, 1:].numel()

    def bounds(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """cu_seqlens [number of documents + 1] where the section resets at documents."""
        if not self.section.reset_at_documents:
            return None
        if "document_ids" not in batch:
            raise ValueError("reset_at_documents needs document_ids in the batch")
        return document_bounds(batch["document_ids"][:, :-1])

    def rows(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a network's pass is told of a batch's rows: the bounds of their documents, or this rank's part."""
        if self._row_group is None:
            return {"cu_seqlens": self.bounds(batch)}
        tokens, ids = batch["input_ids"], batch["document_ids"][:, :-1] if self.section.reset_at_documents else None
        return {"row_part": row_part(self._row_group, tokens.shape[1] - 1, tokens.device, ids)}

    def teacher_hidden(self, input_ids: Tensor, **rows: Any) -> Tensor:
        """The teacher's last hidden state [B,T,D], after its final norm, without gradient."""
        with torch.no_grad():
            return plain_hidden(self.teacher, input_ids, **rows)

    def compare(self, hidden: Tensor, expected: Tensor, labels: Tensor, **settings: Any) -> tuple[Tensor, Metrics]:
        """`forward`'s result of the student's and the teacher's last hidden states. settings: linear_kl's."""
        ours, theirs = (
            (head_inputs(network, state).flatten(0, 1), network.get_output_embeddings().weight)
            for network, state in ((self.student, hidden), (self.teacher, expected))
        )
        loss, metrics = linear_kl(*ours, *theirs, labels_N=labels.flatten(), **settings)
        return loss, {"loss": loss.detach(), **metrics}


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


class DistillObjective(Objective):
    """Stage 2: KL(teacher ‖ student) over the vocabulary, at every position, with an optional cross entropy.

    In training the step's phase sets temperature and weights; in eval mode temperature is 1 and the weights are
    the last phase's. With `rope_fade` kept layers have faded rotary positions in training, and none in eval mode.
    """

    needs_teacher: ClassVar[bool] = True

    def __init__(self, section: DistillSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__(section, student, teacher)
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
        self._ce_weight = spikes.weight if spikes is not None and spikes.has(own) else self._phase.ce_weight

    def _settings(self) -> dict[str, Any]:
        """The current settings of the loss, in the form of linear_kl's argument."""
        if not self.training:
            last = self.section.parts[-1]
            return {"kl_weight": last.kl_weight, "ce_weight": last.ce_weight}
        phase = self._phase
        return {
            "temperature": phase.temperature,
            "teacher_temperature": phase.teacher_temperature,
            "l2wrap": phase.l2wrap,
            "kl_weight": phase.kl_weight,
            "ce_weight": self._ce_weight,
        }

    def fixed_settings(self) -> Hashable:
        return tuple(self._settings().items())

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Metrics]:
        tokens, rows = batch["input_ids"], self.rows(batch)
        teacher_state = self.teacher_hidden(tokens[:, :-1], **rows)
        if self.training and self.rope_factor is not None:
            rows[ROPE_FACTOR] = self.rope_factor
        hidden = self.student.hidden(tokens[:, :-1], **rows)
        return self.compare(hidden, teacher_state, tokens[:, 1:], **self._settings())


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
