"""The last hidden states of students and teachers, as losses on their heads take them.

Dims: B batch, T context, D model width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from radlads.model.student.documents import document_positions
from radlads.model.student.forward_pass import ROW_PART
from radlads.model.student.modeling import RadladsForCausalLM, logit_factor
from radlads.model.teacher.family import backbone
from radlads.model.teacher.load import find_family


def head_inputs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The last hidden state with the family's scale of logits: its product with the head's weight gives the logits."""
    factor = logit_factor(model.config, parts_of(model))
    return hidden if factor == 1.0 else hidden * factor


def parts_of(model: PreTrainedModel) -> Any:
    """The names of a student's, or a family's, parts."""
    return (
        model.parts if isinstance(model, RadladsForCausalLM) else SimpleNamespace(**find_family(model.config).names())
    )


def plain_hidden(
    model: PreTrainedModel, input_ids: Tensor, cu_seqlens: Tensor | None = None, row_part: Any = None
) -> Tensor:
    """The last hidden state of a Hugging Face causal model, with documents separated if bounds are given.

    transformers separates packed documents where positions restart, without mask and cache. row_part: of rows that
    ranks share, with the bounds of their documents (model/sequence_parallel).
    """
    given: dict[str, Any] = {"position_ids": None}
    if row_part is not None:
        given = {"position_ids": row_part.position_ids, ROW_PART: row_part}
    elif cu_seqlens is not None:
        given = {"position_ids": document_positions(cu_seqlens, *input_ids.shape)}
    hidden: Tensor = backbone(model)(input_ids=input_ids, **given, use_cache=False).last_hidden_state
    return hidden
