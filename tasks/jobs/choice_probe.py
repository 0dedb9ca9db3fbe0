"""The probe of a choice by recall: documents that ask for their facts, and windows of held-out text, in batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from radlads.model.layer_scores import ProbeBatch
from radlads.tasks.job import UserError
from radlads.tasks.jobs.bits import Windows
from radlads.tasks.jobs.recall import Quiz, build_quiz, load_filler
from radlads.tasks.jobs.sources import expand_paths, resolve_file
from radlads.tasks.section_choice import RecallProbe


def make_quizzes(section: RecallProbe, tokenizer: PreTrainedTokenizerBase) -> list[Quiz]:
    """`section.documents` of them, lengths in turn; a pure function of the section. Raises UserError."""
    filler = load_filler([resolve_file(name) for name in expand_paths(section.haystack)], section.haystack_separator)
    return [
        build_quiz(
            tokenizer,
            filler,
            length=section.lengths[number % len(section.lengths)],
            rng=random.Random(f"{section.seed}:{number}"),
        )
        for number in range(section.documents)
    ]


def check_probe(section: RecallProbe, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
    """Whether such documents can be made and read. positions: how far the teacher sees. Raises UserError."""
    longest = max(*section.lengths, section.context)
    if positions is not None and longest > positions:
        raise UserError(
            f"attention_layers.recall reads {longest} tokens at once, beyond the {positions} positions that the "
            "teacher was made for; shorten lengths or context"
        )
    make_quizzes(section.model_copy(update={"documents": 1, "lengths": (min(section.lengths),)}), tokenizer)


def quiz_batches(quizzes: Sequence[Quiz], size: int, *, bos_id: int | None) -> list[ProbeBatch]:
    """Batches of documents of like length, padded on the right. bos_id: put before each, where the data has it."""
    ordered = sorted(quizzes, key=lambda quiz: len(quiz.ids))
    batches = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        before = [] if bos_id is None else [bos_id]
        ids_BT = torch.zeros(len(part), len(before) + max(len(quiz.ids) for quiz in part), dtype=torch.int64)
        answers_BT = torch.zeros_like(ids_BT)
        for row, quiz in enumerate(part):
            end = len(before) + len(quiz.ids)
            ids_BT[row, :end] = torch.tensor([*before, *quiz.ids])
            answers_BT[row, len(before) : end] = torch.tensor(quiz.answers)
        batches.append(ProbeBatch(ids_BT, answers_BT))
    return batches


def text_batches(windows: Windows, size: int) -> Iterator[ProbeBatch]:
    """Batches of held-out windows."""
    for start in range(0, len(windows), size):
        yield ProbeBatch(windows.input_ids(range(start, min(start + size, len(windows)))))
