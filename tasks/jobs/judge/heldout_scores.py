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

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.loader import open_dataset

logger = logging.getLogger("radlads")

# Positions whose logits are held in fp32 at a time.
_ROWS = 512

SUMS = ("teacher nll", "student nll", "KL", "top-1 agreement", "teacher nll of text", "student nll of text")
"""What is summed over a window's tokens; `of text`: without the tokens that mark documents."""

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
    markers: tuple[int, ...]
    """Ids of the tokens that begin and end documents, which stand for no text."""

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
    markers = tuple({index["eos_id"], *((index["bos_id"],) if index["add_bos"] else ())})
    return Windows(
        lambda rows: split.batch(list(rows), context)["input_ids"],
        labels.sum(axis=1),
        context,
        index["add_bos"],
        markers,
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
) -> dict[int, list[float]]:
    """Window number → sums over its tokens, in the order of SUMS."""
    scores: dict[int, list[float]] = {}
    markers = torch.tensor(windows.markers, device=teacher.device)
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        ids = windows.input_ids(rows).to(teacher.device)
        theirs = teacher(ids[:, :-1], use_cache=False).logits
        ours = student(ids[:, :-1], use_cache=False).logits
        for row, labels, teacher_TV, student_TV in zip(rows, ids[:, 1:], theirs, ours, strict=True):
            sums = torch.zeros(len(SUMS), dtype=torch.float64)
            for at in range(0, len(labels), _ROWS):
                part = slice(at, at + _ROWS)
                text_T = ~torch.isin(labels[part], markers)
                sums += _compare(labels[part], text_T, teacher_TV[part], student_TV[part]).double().cpu()
            scores[row] = sums.tolist()
        progress(min(start + batch, len(mine)))
    return scores


def _compare(
    labels_T: torch.Tensor, text_T: torch.Tensor, teacher_TV: torch.Tensor, student_TV: torch.Tensor
) -> torch.Tensor:
    """SUMS over T, in fp32."""
    p = teacher_TV.float().log_softmax(-1)
    q = student_TV.float().log_softmax(-1)
    teacher_nll, student_nll = (-x.gather(1, labels_T[:, None]).squeeze(1) for x in (p, q))
    # Identical logits must give exactly nothing, so KL is summed as one difference.
    kl = (p.exp() * (p - q)).sum(-1)
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    columns = (teacher_nll, student_nll, kl, agree, teacher_nll * text_T, student_nll * text_T)
    return torch.stack([column.sum() for column in columns])


def summarize(scores: np.ndarray, num_bytes: np.ndarray, context: int) -> dict[str, dict[str, Estimate]]:
    """Teacher and student numbers from [windows, SUMS]; errors over the windows.

    loss, kl: nats a token. loss_gap: student minus teacher, paired, so its error is far smaller than theirs.
    bits_per_byte: of the text alone, so that it does not depend on how documents are marked.
    """
    teacher, student, kl, agreement, teacher_text, student_text = scores.T
    teacher, student, kl, agreement = (column / context for column in (teacher, student, kl, agreement))
    return {
        "teacher": {
            "loss": mean_of(teacher),
            "bits_per_byte": ratio_of(teacher_text / math.log(2), num_bytes),
        },
        "student": {
            "loss": mean_of(student),
            "bits_per_byte": ratio_of(student_text / math.log(2), num_bytes),
            "loss_gap": mean_of(student - teacher),
            "bits_per_byte_ratio": ratio_of(student_text, teacher_text),
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
