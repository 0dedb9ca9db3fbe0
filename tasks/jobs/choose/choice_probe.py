"""Probe data for choosing layers by recall: batches of quiz documents and of held-out text."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from radlads.model.convert.layer_scores import ProbeBatch
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import AttentionChoice, RecallProbe
from radlads.tasks.jobs.choose.needle_probe import make_needles
from radlads.tasks.jobs.data.loader import TokenSplit
from radlads.tasks.jobs.data.text.recall import Quiz, build_quiz, load_filler
from radlads.tasks.jobs.sources import expand_paths, resolve_file

_ENOUGH = 32  # documents whose share of right answers has an error below ten points


def make_quizzes(section: RecallProbe, tokenizer: PreTrainedTokenizerBase) -> dict[int, list[Quiz]]:
    """Length → quizzes, `section.documents` in total, cycling through the lengths; a pure function of the section.

    Raises UserError.
    """
    filler = load_filler([resolve_file(name) for name in expand_paths(section.haystack)], section.haystack_separator)
    quizzes: dict[int, list[Quiz]] = {}
    for number in range(section.documents):
        length = section.lengths[number % len(section.lengths)]
        quiz = build_quiz(tokenizer, filler, length=length, rng=random.Random(f"{section.seed}:{number}"))
        quizzes.setdefault(length, []).append(quiz)
    return quizzes


def make_probe(choice: AttentionChoice, tokenizer: PreTrainedTokenizerBase, *, add_bos: bool) -> list[ProbeBatch]:
    """Batches of the choice's quizzes; add_bos: whether each begins with BOS. Raises UserError."""
    section, bos_id = choice.recall, tokenizer.bos_token_id if add_bos else None
    if choice.probe is None:
        return quiz_batches(make_quizzes(section, tokenizer), section.micro_batch, bos_id=bos_id)
    return quiz_batches(make_needles(section, choice.probe, tokenizer, add_bos=add_bos), section.micro_batch)


def check_probe(choice: AttentionChoice, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> list[str]:
    """Warnings, for the plan. Raises UserError if the probe cannot be built or is longer than the teacher's maximum
    number of positions."""
    section, probe = choice.recall, choice.probe
    longest = max(*section.lengths, section.context)
    if positions is not None and longest > positions:
        raise UserError(
            f"attention_layers.recall uses sequences of {longest} tokens, but the teacher has {positions} positions; "
            "shorten lengths or context"
        )
    few = {"documents": 1 if probe is None else len(probe.tasks), "lengths": (min(section.lengths),)}
    make_probe(choice.model_copy(update={"recall": section.model_copy(update=few)}), tokenizer, add_bos=False)
    if probe is None or section.documents >= _ENOUGH or not probe.least:
        return []
    error = math.sqrt(probe.least * (1 - probe.least) / section.documents)
    return [
        f"attention_layers.probe asks the teacher for {probe.least:.0%} of {section.documents} answers, with a "
        f"standard error of {100 * error:.0f} points; allow more by recall.documents and by more training tokens"
    ]


def quiz_batches(quizzes: dict[int, list[Quiz]], size: int, *, bos_id: int | None = None) -> list[ProbeBatch]:
    """Batches of quizzes of equal length, padded on the right. bos_id: prepended to each if not None."""
    parts = [part[start : start + size] for part in quizzes.values() for start in range(0, len(part), size)]
    return [_batch(part, [] if bos_id is None else [bos_id]) for part in parts]


def own_share(batches: Sequence[ProbeBatch], rank: int, num_ranks: int) -> list[ProbeBatch]:
    """The batches of a rank, as many as any other's: the last may be another rank's, which does not count here."""
    mine = list(batches[rank::num_ranks])
    if len(mine) * num_ranks < len(batches):
        mine.append(replace(batches[-1], counted=False))
    return mine


def _batch(quizzes: Sequence[Quiz], before: list[int]) -> ProbeBatch:
    ids_BT = torch.zeros(len(quizzes), len(before) + max(len(quiz.ids) for quiz in quizzes), dtype=torch.int64)
    answers_BT = torch.zeros_like(ids_BT)
    for row, quiz in enumerate(quizzes):
        end = len(before) + len(quiz.ids)
        ids_BT[row, :end] = torch.tensor([*before, *quiz.ids])
        answers_BT[row, len(before) : end] = torch.tensor(quiz.answers)
    return ProbeBatch(ids_BT, answers_BT)


def text_batches(split: TokenSplit, section: RecallProbe) -> Iterator[ProbeBatch]:
    """Batches of held-out windows. Raises UserError if there is no held-out text."""
    if split.tokens < 2:
        raise UserError(
            f"{split.folder} has {split.tokens} held-out tokens, too few to measure KL; raise heldout_fraction"
        )
    context = min(section.context, split.tokens - 1)
    for batch in split.heldout(context, section.micro_batch, section.heldout_tokens):
        yield ProbeBatch(batch["input_ids"])
