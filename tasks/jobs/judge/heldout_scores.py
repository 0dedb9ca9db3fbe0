"""Held-out scores of student and teacher per window (loss, bytes, KL, agreement), with standard errors.

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

from radlads.model.training.hidden_states import plain_hidden
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.judge.batching.row_scores import head_logits

logger = logging.getLogger("radlads")

SUMS = ("teacher nll", "student nll", "KL", "top-1 agreement", "teacher nll of text", "student nll of text")
"""Sums over the tokens of a window; `of text`: without BOS and EOS labels."""

Estimate = dict[str, float | None]
"""{"value", "stderr"}; stderr is None for a single window."""


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a held-out stream, with the bytes of text of their labels."""

    input_ids: Callable[[Sequence[int]], torch.Tensor]
    """Window numbers → [windows, context + 1]."""
    num_bytes: np.ndarray
    """UTF-8 bytes of each window's labels, [windows]."""
    context: int
    add_bos: bool
    """Whether documents start with BOS."""
    markers: tuple[int, ...]
    """Ids of the tokens that mark document bounds and represent no text."""

    def __len__(self) -> int:
        return len(self.num_bytes)


def open_windows(folder: Path, context: int, max_tokens: int) -> Windows:
    """The first windows of a dataset's held-out split, up to max_tokens, at least one.

    Raises UserError if the dataset has no bytes per token, or no held-out text.
    """
    split = open_dataset(folder).split("heldout")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    entry = index["splits"]["heldout"]
    if not entry.get("token_bytes_files"):
        raise UserError(f"{folder} has no bytes per token for its held-out split; tokenize it again")
    if split.tokens < 2:
        raise UserError(f"{folder} has {split.tokens} held-out tokens; raise heldout_fraction")
    if split.rows(context) == 0:
        logger.warning("%d held-out tokens are fewer than one window of %d tokens", split.tokens, context)
        context = split.tokens - 1
    count = min(split.rows(context), max(1, max_tokens // context))
    sizes = np.concatenate([np.fromfile(folder / name, "<u4") for name in entry["token_bytes_files"]])
    # The label of position t is token t + 1, so the first token of a window is not scored.
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
    """Window number → sums over its tokens, in the order of SUMS. mine: the window numbers to score."""
    scores: dict[int, list[float]] = {}
    markers = torch.tensor(windows.markers, device=teacher.device)
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        ids = windows.input_ids(rows).to(teacher.device)
        theirs, ours = (plain_hidden(model, ids[:, :-1]).flatten(0, 1) for model in (teacher, student))
        labels_N = ids[:, 1:].flatten()
        parts = zip(head_logits(teacher, theirs), head_logits(student, ours), strict=True)
        columns = [
            _compare(labels_N[part], ~torch.isin(labels_N[part], markers), teacher_nV, student_nV)
            for (part, teacher_nV), (_, student_nV) in parts
        ]
        sums = torch.cat(columns, 1).view(len(SUMS), len(rows), -1).double().sum(-1).T
        scores |= dict(zip(rows, sums.tolist(), strict=True))
        progress(min(start + batch, len(mine)))
    return scores


def _compare(
    labels_T: torch.Tensor, text_T: torch.Tensor, teacher_TV: torch.Tensor, student_TV: torch.Tensor
) -> torch.Tensor:
    """What SUMS adds up, in fp32, [SUMS,T]."""
    p = teacher_TV.float().log_softmax(-1)
    q = student_TV.float().log_softmax(-1)
    teacher_nll, student_nll = (-x.gather(1, labels_T[:, None]).squeeze(1) for x in (p, q))
    # p · (log p − log q) in one product, so that identical logits give exactly 0.
    kl = (p.exp() * (p - q)).sum(-1)
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    columns = (teacher_nll, student_nll, kl, agree, teacher_nll * text_T, student_nll * text_T)
    return torch.stack(columns)


def summarize(scores: np.ndarray, num_bytes: np.ndarray, context: int) -> dict[str, dict[str, Estimate]]:
    """Teacher and student estimates from scores [windows, SUMS]; standard errors over windows.

    loss, kl: nats per token. loss_gap: student minus teacher, paired by window, which reduces its error.
    bits_per_byte: over text tokens only, so that it does not depend on document markers.
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
    """Raises UserError if a score of the model is not finite."""
    bad = [key for key, estimate in numbers.items() if not math.isfinite(estimate["value"])]
    if bad:
        raise UserError(f"the model '{name}' has non-finite scores ({', '.join(bad)}) and cannot be evaluated")
