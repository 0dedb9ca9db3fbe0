"""The objective's metrics over the held-out split: each rank evaluates its rows; the average is over all ranks."""

from __future__ import annotations

import logging

import torch
from torch import distributed

from radlads.model.training.objectives import Objective
from radlads.tasks.jobs.data.loader import TokenSplit
from radlads.tasks.jobs.train.engine import to_device

logger = logging.getLogger("radlads")


@torch.no_grad()
def heldout_metrics(
    objective: Objective,
    split: TokenSplit,
    *,
    context: int,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
    rank: int,
    world_size: int,
    document_ids: bool,
) -> dict[str, float]:
    """`heldout/<metric>` over the first rows of the split, up to max_tokens. Every rank calls it; {} without a label.

    Each batch is weighted by the labels that the objective counts in it, so that the result does not depend on how the
    rows are distributed.
    """
    context = min(context, split.tokens - 1)
    if context < 1:
        logger.warning("the held-out split is empty: no held-out loss")
        return {}
    batches = split.heldout(
        context, batch_size, max_tokens, rank=rank, world_size=world_size, document_ids=document_ids
    )
    was_training = objective.training
    objective.eval()
    totals: dict[str, torch.Tensor] = {}
    labels = 0
    for batch in batches:
        weight = objective.num_labels(batch)
        if weight == 0:
            continue
        loss, metrics = objective(to_device(batch, device))
        for name, value in ({"loss": loss} | metrics).items():
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64, device=device)) + weight * value
        labels += weight
    if not totals:  # fewer rows than ranks, or no label: run for the metric names, with weight 0
        loss, metrics = objective(to_device(split.batch([0], context, document_ids=document_ids), device))
        totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in {"loss": loss} | metrics}
    objective.train(was_training)
    reduced = torch.stack([torch.full_like(totals["loss"], labels), *totals.values()])
    if world_size > 1:
        distributed.all_reduce(reduced)
    count, *sums = reduced.tolist()
    if not count:
        logger.warning("no token of the held-out rows is a label: no held-out loss")
        return {}
    return {f"heldout/{name}": total / count for name, total in zip(totals, sums, strict=True)}
