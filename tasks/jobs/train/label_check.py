"""Check before the first step that every step of a training stage has a label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.jobs.data.batch_plan import BatchPlan


def check_labels(section: Training, plans: Sequence[BatchPlan]) -> None:
    """Raises UserError for an assistant-only stage with a step whose sequences hold no token of the assistant.

    plans: one for each part of the stage. If every token is a label there is nothing to check; the objective refuses a
    dataset without masks. Reads the masks once, a byte per token.
    """
    if not getattr(section, "assistant_only", False) or not plans[0].split.mask_files:
        return
    first = 0
    for part, plan in zip(section.parts, plans, strict=True):
        labels = plan.labels()
        if not labels.any():
            raise UserError(
                f"assistant_only is on, but none of the {labels.size * plan.context} tokens of data '{section.data}' "
                "is the assistant's: nothing would be learnt; look at messages_field, the roles of the chats and the "
                "chat template, or turn assistant_only off"
            )
        empty = None if labels.all() else _first_empty(labels, plan, part.own_steps)
        if empty is not None:
            raise UserError(
                f"assistant_only is on, and the {plan.batch} sequences of {plan.context} tokens of step "
                f"{first + empty + 1} hold no token of the assistant: nothing could be learnt from it; use a larger "
                "batch or context, another seed, or data in which the assistant says more"
            )
        first += part.own_steps


def _first_empty(labels: np.ndarray, plan: BatchPlan, steps: int) -> int | None:
    """The first step of a part (counted from 0) without a label."""
    return next((step for step in range(steps) if not labels[plan.rows(step)].any()), None)
