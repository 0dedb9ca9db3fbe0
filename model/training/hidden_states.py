"""Last hidden states of any network that trains or teaches, and what its head multiplies. Dims: B batch, T context,
D model width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from radlads.model.student.documents import document_positions
from radlads.model.student.kept_attention import ROW_PART
from radlads.model.student.modeling import RadladsForCausalLM, logit_factor
from radlads.model.teacher.family import backbone
from radlads.model.teacher.load import find_family


def head_inputs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The last hidden state with the family's scale of logits: its product with the head's weight gives the logits."""
    factor = logit_factor(model.config, family_parts(model))
    return hidden if factor == 1.0 else hidden * factor


def family_parts(model: PreTrainedModel) -> Any:
    """The names of the parts of a student's or teacher's family."""
    return (
        model.parts if isinstance(model, RadladsForCausalLM) else SimpleNamespace(**find_family(model.config).names())
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a student, or of a model of a known family."""
    layers: nn.ModuleList = getattr(backbone(model), family_parts(model).layers)
    return layers


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


@contextmanager
def rows_are_whole() -> Iterator[None]:
    """Passes inside have one document a row, and no padding: transformers does not look for positions that restart.

    It would wait for the device in each pass to see that none do, and build a full mask where it cannot look, as while
    a CUDA graph is recorded.
    """
    original, internals = masking_utils.find_packed_sequence_indices, cast(Any, masking_utils)
    internals.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        internals.find_packed_sequence_indices = original
