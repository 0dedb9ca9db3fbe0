"""The objective's metrics over the held-out split: each rank evaluates its rows; the average is over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from radlads.model.training.objectives import Objective
from radlads.tasks.jobs.data.batch_plan import part_of
from radlads.tasks.jobs.data.loader import Batch, TokenSplit
from radlads.tasks.jobs.train.engines.engine import to_device

logger = logging.getLogger("radlads")


@torch.no_grad()
def heldout_metrics(
    objective: Objective,
    forward: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]],
    split: TokenSplit,
    *,
    context: int,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
    rank: int,
    world_size: int,
    document_ids: bool,
    sharing: int = 1,
) -> dict[str, float]:
    """`heldout/<metric>` over the first rows of the split, up to max_tokens. Every rank calls it; {} without a label.

    forward: the engine's; every rank calls it equally often, with a row that has no weight where it has fewer batches.
    Each batch is weighted by the labels that the objective counts in it, so that the result does not depend on how the
    rows are distributed. sharing: consecutive ranks that share rows; a split shorter than a row is cut to what they can
    divide.
    """
    group, place = divmod(rank, sharing)
    context = min(context, split.tokens - 1) // sharing * sharing
    if context < 1:
        logger.warning("the held-out split is empty: no held-out loss")
        return {}
    batches = split.heldout(
        context, batch_size, max_tokens, rank=group, world_size=world_size // sharing, document_ids=document_ids
    )
    was_training = objective.training
    objective.eval()
    totals: dict[str, torch.Tensor] = {}
    labels = 0
    own = [part_of(batch, place, sharing) for batch in batches if objective.num_labels(batch) > 0]
    filler = part_of(split.batch([0], context, document_ids=document_ids), place, sharing)
    for index in range(_most(len(own), device, world_size)):
        batch = own[index] if index < len(own) else filler
        weight = objective.num_labels(batch) if index < len(own) else 0
        loss, metrics = forward(to_device(batch, device))
        for name, value in ({"loss": loss} | metrics).items():
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64, device=device)) + weight * value
        labels += weight
    objective.train(was_training)
    reduced = torch.stack([torch.full_like(totals["loss"], labels), *totals.values()])
    if world_size > 1:
        distributed.all_reduce(reduced)
    count, *sums = reduced.tolist()
    if not count:
        logger.warning("no token of the held-out rows is a label: no held-out loss")
        return {}
    return {f"heldout/{name}": total / count for name, total in zip(totals, sums, strict=True)}


def _most(own: int, device: torch.device, world_size: int) -> int:
    """The largest number of any rank, at least 1."""
    most = torch.tensor(max(1, own), device=device)
    if world_size > 1:
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return int(most)
