"""Probe data for choosing layers by recall: batches of quiz documents and of held-out text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from radlads.model.convert.layer_scores import ProbeBatch
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import RecallProbe
from radlads.tasks.jobs.data.loader import TokenSplit
from radlads.tasks.jobs.data.text.recall import Quiz, build_quiz, load_filler
from radlads.tasks.jobs.sources import expand_paths, resolve_file


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


def check_probe(section: RecallProbe, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
    """Raises UserError if the probe cannot be built or is longer than the teacher's maximum number of positions."""
    longest = max(*section.lengths, section.context)
    if positions is not None and longest > positions:
        raise UserError(
            f"attention_layers.recall uses sequences of {longest} tokens, but the teacher has {positions} positions; "
            "shorten lengths or context"
        )
    make_quizzes(section.model_copy(update={"documents": 1, "lengths": (min(section.lengths),)}), tokenizer)


def quiz_batches(quizzes: dict[int, list[Quiz]], size: int, *, bos_id: int | None) -> list[ProbeBatch]:
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
