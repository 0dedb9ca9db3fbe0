"""Scores of restoring a layer's softmax attention: recall and held-out KL, from forward passes alone.

Dims: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radlads.kernels.linear_kl import linear_kl
from radlads.model.convert.layer_search import Layers, LayerScore
from radlads.model.convert.restore import restored
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.training.hidden_states import head_inputs, plain_hidden


@dataclass(frozen=True)
class ProbeBatch:
    """One batch of the probe's sequences. Padding, if any, is on the right: every model here is causal."""

    input_ids: Tensor
    """[B,T] int64."""
    answers: Tensor | None = None
    """[B,T] int64: 0, or the number of the answer that a token belongs to, from 1 on in every row. None: held-out text,
    whose KL is measured at all positions but the last."""
    counted: bool = True
    """False: it is in no sum and no number of tokens; it runs so that all processes make the same passes."""


@dataclass(frozen=True)
class Sums:
    """Sums over a probe; the sums of several processes can be added."""

    log_probability: float = 0.0
    answer_tokens: int = 0
    right_answers: int = 0
    answers: int = 0
    kl: float = 0.0
    text_tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def score(self) -> LayerScore:
        """Means; NaN for a kind of batch that the probe did not contain."""
        return LayerScore(
            recall=_ratio(self.log_probability, self.answer_tokens),
            accuracy=_ratio(self.right_answers, self.answers),
            kl=_ratio(self.kl, self.text_tokens),
        )


@dataclass
class TokenCount:
    """Tokens processed by a network, all passes added."""

    student: int = 0
    teacher: int = 0


@torch.no_grad()
def sum_layers(
    student: RadladsForCausalLM,
    teacher: PreTrainedModel,
    batches: Iterable[ProbeBatch],
    sets: Sequence[Layers],
    *,
    count: TokenCount | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[Layers, Sums]:
    """Set of restored layers → sums over the batches. count: receives numbers of tokens; progress: called after each
    pass."""
    was_training = student.training
    student.eval()
    totals = {layers: Sums() for layers in sets}
    for batch in batches:
        ids = batch.input_ids.to(student.device)
        teacher_state = plain_hidden(teacher, ids[:, :-1], None) if batch.answers is None else None
        tokens = ids[:, :-1].numel() if batch.counted else 0
        if count is not None and teacher_state is not None:
            count.teacher += tokens
        for layers in totals:
            with restored(student, teacher, layers):
                hidden = student.hidden(ids[:, :-1])
            if batch.counted:
                totals[layers] += _compare(student, teacher, batch, hidden, teacher_state)
            if count is not None:
                count.student += tokens
            progress()
    student.train(was_training)
    return totals


@torch.no_grad()
def teacher_recall(teacher: PreTrainedModel, batches: Iterable[ProbeBatch], *, count: TokenCount | None = None) -> Sums:
    """The teacher's own score on the recall batches; other batches are skipped."""
    total = Sums()
    for batch in batches:
        if batch.answers is None:
            continue
        ids = batch.input_ids.to(teacher.device)
        hidden = plain_hidden(teacher, ids[:, :-1], None)
        if not batch.counted:
            continue
        total += _recall(teacher, batch, hidden)
        if count is not None:
            count.teacher += ids[:, :-1].numel()
    return total


def _compare(
    student: RadladsForCausalLM,
    teacher: PreTrainedModel,
    batch: ProbeBatch,
    hidden: Tensor,
    teacher_state: Tensor | None,
) -> Sums:
    if teacher_state is None:
        return _recall(student, batch, hidden)
    _, metrics = linear_kl(
        head_inputs(student, hidden).flatten(0, 1),
        student.get_output_embeddings().weight,
        head_inputs(teacher, teacher_state).flatten(0, 1),
        teacher.get_output_embeddings().weight,
    )
    tokens = hidden.shape[0] * hidden.shape[1]
    return Sums(kl=float(metrics["kl"]) * tokens, text_tokens=tokens)


def _recall(model: PreTrainedModel, batch: ProbeBatch, hidden_BTD: Tensor) -> Sums:
    """Values for the answers' tokens, each predicted from the position before it."""
    assert batch.answers is not None
    answers_BT = batch.answers[:, 1:].to(hidden_BTD.device)
    labels_BT = batch.input_ids[:, 1:].to(hidden_BTD.device)
    at = answers_BT > 0
    head = model.get_output_embeddings().weight
    logits_NV = torch.nn.functional.linear(head_inputs(model, hidden_BTD[at]), head).float()
    labels_N = labels_BT[at]
    right_N = logits_NV.argmax(-1) == labels_N
    log_probabilities_N = logits_NV.log_softmax(-1).gather(1, labels_N[:, None]).squeeze(1)
    # An answer is right when all of its tokens are.
    rows_N = at.nonzero()[:, 0]
    keys_N = rows_N * (int(answers_BT.max()) + 1) + answers_BT[at]
    _, groups_N = keys_N.unique(return_inverse=True)
    num_answers = int(groups_N.max()) + 1 if len(groups_N) else 0
    wrong = torch.zeros(num_answers, dtype=torch.int64, device=right_N.device).index_add(0, groups_N, (~right_N).long())
    return Sums(
        log_probability=float(log_probabilities_N.double().sum()),
        answer_tokens=len(labels_N),
        right_answers=int((wrong == 0).sum()),
        answers=num_answers,
    )


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")
