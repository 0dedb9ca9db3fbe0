"""Held-out scores of a student beside its teacher, window by window: losses, bytes, KL, agreement; and their errors.

Dims: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from radlads.tasks.job import UserError
from radlads.tasks.jobs.loader import open_dataset

logger = logging.getLogger("radlads")

# Positions whose logits are held in fp32 at a time.
_ROWS = 512

Estimate = dict[str, float | None]
"""{"value", "stderr"}; stderr None where one window cannot tell."""


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a held-out stream, and the bytes of text that their labels stand for."""

    input_ids: Callable[[Sequence[int]], torch.Tensor]
    """Window numbers → [windows, context + 1]."""
    num_bytes: np.ndarray
    """[windows] UTF-8 bytes of each window's labels."""
    context: int
    add_bos: bool
    """Whether the dataset put BOS before its documents."""

    def __len__(self) -> int:
        return len(self.num_bytes)


def open_windows(folder: Path, context: int, max_tokens: int) -> Windows:
    """The first windows of a dataset's held-out split, up to max_tokens, at least one.

    Raises UserError for a dataset without bytes per token, or without held-out text.
    """
    split = open_dataset(folder).split("heldout")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    sheet = index["splits"]["heldout"]
    if not sheet.get("token_bytes_files"):
        raise UserError(f"{folder} has no bytes per token for its held-out split; tokenize it again")
    if split.tokens < 2:
        raise UserError(f"{folder} has {split.tokens} held-out tokens; raise heldout_fraction")
    if split.rows(context) == 0:
        logger.warning("%d held-out tokens are less than one window of %d", split.tokens, context)
        context = split.tokens - 1
    count = min(split.rows(context), max(1, max_tokens // context))
    sizes = np.concatenate([np.fromfile(folder / name, "<u4") for name in sheet["token_bytes_files"]])
    # The label of position t is token t + 1, so a window's first token is never scored in it.
    labels = sizes[1 : 1 + count * context].reshape(count, context)
    return Windows(
        lambda rows: split.batch(list(rows), context)["input_ids"], labels.sum(axis=1), context, index["add_bos"]
    )


@torch.no_grad()
def score_windows(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    windows: Windows,
    *,
    batch: int,
    mine: Sequence[int],
    progress: Callable[[int], None] = lambda _done: None,
) -> dict[int, tuple[float, float, float, float]]:
    """Window number → sums over its tokens of (teacher's nll, student's nll, KL(teacher‖student), top-1 agreement)."""
    scores: dict[int, tuple[float, float, float, float]] = {}
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        ids = windows.input_ids(rows).to(teacher.device)
        theirs = teacher(ids[:, :-1], use_cache=False).logits
        ours = student(ids[:, :-1], use_cache=False).logits
        for row, labels, teacher_TV, student_TV in zip(rows, ids[:, 1:], theirs, ours, strict=True):
            sums = torch.zeros(4, dtype=torch.float64)
            for at in range(0, len(labels), _ROWS):
                part = slice(at, at + _ROWS)
                sums += _compare(labels[part], teacher_TV[part], student_TV[part]).double().cpu()
            scores[row] = tuple(sums.tolist())  # type: ignore[assignment]
        progress(min(start + batch, len(mine)))
    return scores


def _compare(labels_T: torch.Tensor, teacher_TV: torch.Tensor, student_TV: torch.Tensor) -> torch.Tensor:
    """[4] sums over T, in fp32."""
    p = teacher_TV.float().log_softmax(-1)
    q = student_TV.float().log_softmax(-1)
    index = labels_T[:, None]
    # Identical logits must give exactly nothing, so KL is summed as one difference.
    kl = (p.exp() * (p - q)).sum(-1)
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    return torch.stack([-p.gather(1, index).sum(), -q.gather(1, index).sum(), kl.sum(), agree.sum()])


def summarize(scores: np.ndarray, num_bytes: np.ndarray, context: int) -> dict[str, dict[str, Estimate]]:
    """Teacher and student numbers from [windows, 4] sums; errors over the windows.

    loss, kl: nats a token. loss_gap: student minus teacher, paired, so its error is far smaller than theirs.
    """
    teacher, student, kl, agreement = (scores / context).T
    return {
        "teacher": {
            "loss": mean_of(teacher),
            "bits_per_byte": ratio_of(scores[:, 0] / math.log(2), num_bytes),
        },
        "student": {
            "loss": mean_of(student),
            "bits_per_byte": ratio_of(scores[:, 1] / math.log(2), num_bytes),
            "loss_gap": mean_of(student - teacher),
            "bits_per_byte_ratio": ratio_of(scores[:, 1], scores[:, 0]),
            "kl": mean_of(kl),
            "top1_agreement": mean_of(agreement),
        },
    }


def mean_of(values: np.ndarray) -> Estimate:
    """Mean and its standard error."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "stderr": error}


def ratio_of(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Σ above / Σ below, and its standard error by the delta method."""
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return {"value": value, "stderr": None}
    residual = above - value * below
    count = len(above)
    return {"value": value, "stderr": float(math.sqrt((residual**2).sum() * count / (count - 1)) / below.sum())}


def check_finite(name: str, numbers: dict[str, Any]) -> None:
    """Raises UserError naming the model when a score is no number: such a model cannot be judged."""
    bad = [key for key, estimate in numbers.items() if not math.isfinite(estimate["value"])]
    if bad:
        raise UserError(f"the model '{name}' gives {', '.join(bad)} that is no number; it cannot be judged")
