"""What the objectives of all training stages share.

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

from radlads.kernels.linear_kl import linear_kl
from radlads.model.sequence_parallel.attention import exchange_heads
from radlads.model.sequence_parallel.row_part import row_part
from radlads.model.student.documents import document_bounds
from radlads.model.student.modeling import RadladsForCausalLM, parameter_group
from radlads.model.student.precision import remember_buffers, restore_buffers
from radlads.model.teacher.family import NO_RESTART
from radlads.model.training.hidden_states import family_parts, head_inputs, plain_hidden
from radlads.model.training.lora import lora_trains
from radlads.model.training.mixer_parts import mixer_parts
from radlads.model.training.settings import HasLora, HasTrainOnly, SectionSettings
from radlads.tasks.contracts.errors import UserError

Metrics = dict[str, Tensor]


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
        tied = student.config.tie_word_embeddings
        if tied and len(self._frozen & {"embeddings", "head"}) == 1:
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
        """Called before every optimizer step (counted from 0)."""

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
