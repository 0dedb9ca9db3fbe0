"""Softmax attention over rows that several ranks share: an exchange of heads for tokens (DeepSpeed-Ulysses,
arXiv 2309.14509).

Each rank gets the whole row of H/P heads, runs the attention that is configured, and gives the tokens of the others
back. Causality and documents are those of the whole row; nothing is as large as tokens times tokens. transformers makes
no mask for an attention that it does not know, and dispatches to it by its registered name.

Dims: B rows, H query heads, G key-value heads, T tokens of a row, L = T/P tokens of a rank, P ranks, K width of a head.
"""

from __future__ import annotations

import copy
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from radlads.model.sequence_parallel.exchange import AllToAll
from radlads.model.sequence_parallel.limits import sharing_fault
from radlads.model.sequence_parallel.row_part import RowPart
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.family import backbone
from radlads.tasks.contracts.errors import UserError

_MARK = "radlads_over_ranks_"


def exchange_heads(network: PreTrainedModel, ranks: int, context: int) -> None:
    """Let a network run over rows of `context` tokens that `ranks` ranks share; every pass then needs a `row_part`.

    Raises UserError if it cannot.
    """
    config: Any = backbone(network).config
    is_student = isinstance(network, RadladsForCausalLM)
    kept = network.config.attention_layers if is_student else range(config.num_hidden_layers)
    by_heads = is_student and any(mixer.SHARES_ROWS_BY_HEADS for mixer in network.mixers().values())
    if fault := sharing_fault(config, kept, ranks, context=context, by_heads=by_heads):
        raise UserError(f"sequence_parallel: {fault}")
    inner = config._attn_implementation
    if inner not in ("sdpa", "flash_attention_2", "flash_attention_3"):
        raise UserError(f"sequence_parallel needs the attention `sdpa` or a flash attention, not `{inner}`")
    ALL_ATTENTION_FUNCTIONS.register(_MARK + inner, partial(attention_over_ranks, inner))
    config._attn_implementation = _MARK + inner


def attention_over_ranks(
    inner: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    row_part: RowPart,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`(out [B,L,H,K], None)`, as transformers' attention functions. query [B,H,L,K], key and value [B,G,L,K].

    inner: the name of the function for whole rows. position_ids: this part's, of no use there.
    """
    ranks, heads, groups = row_part.group.size(), query.shape[1], key.shape[1]
    repeats = ranks // gcd(groups, ranks)
    if repeats > 1:  # fewer than there are ranks: several ranks hold the same
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        module = copy.copy(module)
        module.num_key_value_groups = heads // (groups * repeats)
    whole = _to_heads(row_part, query, key, value)
    function = partial(ALL_ATTENTION_FUNCTIONS[inner], module, **options)
    return _to_tokens(row_part, _over_documents(function, row_part.documents, *whole)), None


def _over_documents(function: Any, documents: list[tuple[int, int]] | None, *qkv: Tensor) -> Tensor:
    """The output [B,T,H/P,K]: of whole rows, or of one document after the other."""
    if documents is None:
        return function(*qkv, None)[0]
    B, _, T, _ = qkv[0].shape
    outs = []
    for start, stop in documents:
        row, first = divmod(start, T)
        outs.append(function(*(x[row : row + 1, :, first : first + stop - start] for x in qkv), None)[0])
    return torch.cat(outs, 1).unflatten(1, (B, T))[0]


def _to_heads(part: RowPart, *qkv: Tensor) -> list[Tensor]:
    """[B,H,L,K] each -> [B,H/P,T,K] each: one exchange."""
    ranks = part.group.size()
    sent = torch.cat([x.unflatten(1, (ranks, -1)) for x in qkv], 2).transpose(0, 1)  # [P,B,heads,L,K]
    received = AllToAll.apply(part.group, sent)
    whole = received.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return list(whole.split([x.shape[1] // ranks for x in qkv], 1))


def _to_tokens(part: RowPart, out_BTHK: Tensor) -> Tensor:
    """[B,T,H/P,K] -> [B,L,H,K]."""
    received = AllToAll.apply(part.group, out_BTHK.unflatten(1, (part.group.size(), -1)).transpose(0, 1))
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)
