"""Log-probabilities of given tokens, in passes of several rows; logits are made only where they are asked for.

Dims: B rows, T positions, D model width, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radlads.model.student.modeling import logit_factor
from radlads.model.training.hidden_states import family_parts, plain_hidden
from radlads.tasks.jobs.judge.batching.budget import LOGITS, Rows
from radlads.tasks.jobs.judge.divided import is_divided

logger = logging.getLogger("radlads")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ScoredRow:
    """What a pass reads, and the tokens that are to follow its last positions."""

    ids: tuple[int, ...]
    """Without the last token that is scored."""
    targets: tuple[tuple[int, ...], ...]
    """Each scored by the logits of as many of the last positions."""


def batches_of(lengths: Sequence[int], rows: Rows) -> list[list[int]]:
    """Numbers of the rows of each pass, longest first, so that padding is small and memory limits show early."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    at = 0
    while at < len(order):
        count = rows(lengths[order[at]])
        batches.append(order[at : at + count])
        at += count
    return batches


def head_logits(model: PreTrainedModel, hidden_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(part of N, its logits [n,V]) for all of N, a bounded number at a time. hidden_ND: after the final norm."""
    head: Any = model.get_output_embeddings()
    factor = logit_factor(model.config, family_parts(model))
    size = max(1, LOGITS[hidden_ND.device.type] // model.config.vocab_size)
    for start in range(0, len(hidden_ND), size):
        part = slice(start, start + size)
        logits_nV = head(hidden_ND[part])
        yield part, logits_nV if factor == 1.0 else logits_nV * factor


@torch.no_grad()
def score_rows(
    model: PreTrainedModel, rows: Sequence[ScoredRow], dtype: torch.dtype | None = None
) -> list[list[tuple[Tensor, bool]]]:
    """For each target of each row: (log-probabilities [n] of its tokens, on the CPU; whether each has the largest
    one). dtype: of the log-probabilities; None: the logits' own. One pass; rows are padded on the right, which no
    causal model sees."""
    width = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    places: list[int] = []
    wanted: list[int] = []
    for number, row in enumerate(rows):
        ids_BT[number, : len(row.ids)] = torch.tensor(row.ids)
        end = number * width + len(row.ids)
        for target in row.targets:
            places += range(end - len(target), end)
            wanted += target
    hidden_BTD = plain_hidden(model, ids_BT.to(model.device))
    hidden_ND = hidden_BTD.flatten(0, 1)[torch.tensor(places, device=hidden_BTD.device)]
    wanted_N = torch.tensor(wanted, device=hidden_BTD.device)
    found, largest = [], []
    for part, logits_nV in head_logits(model, hidden_ND):
        scores_nV = logits_nV.log_softmax(-1, dtype=dtype)
        found.append(scores_nV.gather(1, wanted_N[part, None]).squeeze(1))
        largest.append(scores_nV.argmax(-1) == wanted_N[part])
    sizes = [len(target) for row in rows for target in row.targets]
    scores = zip(torch.cat(found).cpu().split(sizes), torch.cat(largest).cpu().split(sizes), strict=True)
    return [[(own, bool(hits.all())) for own, hits in (next(scores) for _ in row.targets)] for row in rows]


def run_halving(
    model: PreTrainedModel, items: Sequence[Item], run: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """run's results, of halves of the items where all of them do not fit in memory. A divided model raises
    OutOfMemoryError instead: the other ranks wait in the middle of the pass that failed."""
    try:
        return run(items)
    except torch.OutOfMemoryError:
        if is_divided(model) or len(items) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(items) // 2
    logger.warning("%d rows do not fit in memory at once and are read by halves", len(items))
    return [*run_halving(model, items[:half], run), *run_halving(model, items[half:], run)]
