"""The needle job: retrieval of a fact at a given depth of a text of a given length, by greedy generation and string
match.

Teacher and students get identical prompts. A length that does not fit in memory is reported as not run and excluded
from all means.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.recipe.sections import Needle
from radlads.tasks.contracts.specs import NeedleSpec
from radlads.tasks.jobs.common import Job, run_job, write_json
from radlads.tasks.jobs.data.text.chat import ChatTemplate, open_chat_template
from radlads.tasks.jobs.data.text.recall import Case, build_case, load_filler
from radlads.tasks.jobs.data.text.token_encoder import BARE, TokenEncoder, prompt_frame
from radlads.tasks.jobs.judge.divided import in_step, is_divided
from radlads.tasks.jobs.judge.heatmap import draw_heatmap
from radlads.tasks.jobs.judge.judged_models import (
    TEACHER,
    continue_ids,
    open_teacher,
    open_tokenizer,
    opened_student,
    student_names,
)
from radlads.tasks.jobs.judge.needle_grid import flatten, make_cells, summarize
from radlads.tasks.jobs.origin import check_judged
from radlads.tasks.jobs.process_group import gather
from radlads.tasks.jobs.sources import expand_paths, resolve_file

logger = logging.getLogger("radlads")


@dataclass(frozen=True)
class Trial:
    """One prompt of the grid."""

    length: int
    depth: float
    number: int
    case: Case


@dataclass(frozen=True)
class Answer:
    """Output of a model; text is None if the length was not run."""

    text: str | None
    hit: bool


def main(job: Job) -> dict[str, Any] | None:
    """Write needle.json and needle.png; returns the means by model and length."""
    spec: NeedleSpec = job.typed
    section = spec.section
    started = time.monotonic()
    tokenizer, names = open_tokenizer(job, spec.teacher), student_names(job)
    own = check_judged(job, names, spec.teacher, tokenizer, other_teacher=spec.other_teacher)
    trials = make_trials(section, tokenizer)
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float] = {}
    total = len(trials) * (1 + len(names))

    def run(name: str, model: PreTrainedModel) -> None:
        start = time.monotonic()
        done = len(answers) * len(trials)
        answers[name] = _generate_answers(
            job, model, tokenizer, trials, section, lambda n: job.progress(done + n, total, "prompts")
        )
        seconds[name] = time.monotonic() - start
        hits = sum(answer.hit for answer in answers[name])
        logger.info("%s: %d of %d needles found in %.1f s", name, hits, len(trials), seconds[name])

    run(TEACHER, open_teacher(job, spec.teacher))
    for name in names:
        with opened_student(job, name) as student:
            run(name, student)
    if job.rank != 0:
        return None
    hits = {name: [None if a.text is None else a.hit for a in replies] for name, replies in answers.items()}
    sheet = {
        "teacher": spec.teacher.model_dump(mode="json"),
        "other_teacher": not own,
        "lengths": list(section.lengths),
        "depths": list(section.depths),
        "trials": section.trials,
        "training_length": spec.training_length,
        "max_new_tokens": section.max_new_tokens,
        "prompt_begins_with_bos": trials[0].case.prompt_ids[0] == tokenizer.bos_token_id,
        "models": summarize(trials, hits, spec.training_length),
        "cells": make_cells(trials, hits),
        "examples": _examples(trials, answers),
        "seconds": seconds,
        "dtype": str(job.dtype).removeprefix("torch."),
    }
    write_json(job.output / "needle.json", sheet)
    draw_heatmap(sheet, job.output / "needle.png")
    numbers = flatten(sheet)
    job.record.log(0, numbers)
    job.record.artifact(job.output / "needle.png")
    return numbers | {"seconds": time.monotonic() - started, "processes": job.world_size}


def make_trials(section: Needle, tokenizer: PreTrainedTokenizerBase) -> list[Trial]:
    """All prompts of the grid, shortest lengths first; a pure function of the section. Raises UserError."""
    paths = [resolve_file(name) for name in expand_paths(section.haystack)]
    filler = load_filler(paths, section.haystack_separator)
    template = open_chat_template(TokenEncoder(tokenizer), None) if section.chat_template else None
    # A chat template writes its own control tokens, so the prompt inside it has no frame.
    frame = prompt_frame(tokenizer, section.add_bos) if template is None else BARE
    trials: list[Trial] = []
    for length in sorted(set(section.lengths)):
        for depth in dict.fromkeys(section.depths):
            for number in range(section.trials):
                rng = random.Random(f"{section.seed}:{length}:{depth}:{number}")
                case = build_case(tokenizer, filler, length=length, depth=depth, rng=rng, frame=frame)
                trials.append(Trial(length, depth, number, _as_chat(template, case, section) if template else case))
    return trials


def _as_chat(template: ChatTemplate, case: Case, section: Needle) -> Case:
    """The prompt as a user message; template tokens are added to the length."""
    rendered = template.prompt(case.prompt)
    ids, _, _ = template.encode(rendered)
    before, _ = (prompt_frame(template.encoder.tokenizer, True) if section.add_bos else BARE).around(ids)
    return Case(rendered.text, [*before, *ids], case.answer)


def _generate_answers(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trials: Sequence[Trial],
    section: Needle,
    progress: Callable[[int], None],
) -> list[Answer]:
    """The model's answers in the order of the trials, on every rank; each rank generates its share."""
    batches = _batches(trials, section.batch)
    own: dict[int, Answer] = {}
    with in_step(model):
        for count, batch in enumerate(batches[job.rank :: job.world_size], start=1):
            texts = generate(model, tokenizer, [trials[i].case.prompt_ids for i in batch], section.max_new_tokens)
            for index, text in zip(batch, texts, strict=True):
                own[index] = Answer(text, text is not None and is_hit(text, trials[index].case.answer))
            progress(min(len(trials), count * section.batch * job.world_size))
    answers: dict[int, Answer] = {}
    for part in gather(own, job.world_size):
        answers |= part
    return [answers[index] for index in range(len(trials))]


def is_hit(text: str, answer: str) -> bool:
    """Whether the text contains the answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def _batches(trials: Sequence[Trial], size: int) -> list[list[int]]:
    """Batches of trial indices of equal length, longest first, so that memory limits show early."""
    batches: list[list[int]] = []
    for length in sorted({trial.length for trial in trials}, reverse=True):
        chosen = [i for i, trial in enumerate(trials) if trial.length == length]
        batches += [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return batches


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str | None]:
    """Greedy continuations with cache, left-padded; None for a prompt that does not fit in memory.

    A divided model raises OutOfMemoryError instead: the other ranks wait in the middle of the pass that failed.
    """
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids_BT = torch.full((len(prompts), width), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    eos = tokenizer.eos_token_id
    try:
        rows = continue_ids(
            model, ids_BT, mask_BT, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad
        )
    except torch.OutOfMemoryError:
        if is_divided(model):
            raise
        torch.cuda.empty_cache()
        if len(prompts) == 1:
            logger.warning("a prompt of %d tokens does not fit in memory; this length is not run", width)
            return [None]
        half = len(prompts) // 2
        first = generate(model, tokenizer, prompts[:half], max_new_tokens)
        return first + generate(model, tokenizer, prompts[half:], max_new_tokens)
    return list(tokenizer.batch_decode(rows[:, width:], skip_special_tokens=True))


def _examples(trials: Sequence[Trial], answers: dict[str, list[Answer]]) -> list[dict[str, Any]]:
    """The first trial of each cell: the expected answer and the output of each model."""
    return [
        {"length": t.length, "depth": t.depth, "expected": t.case.answer, "prompt_tokens": len(t.case.prompt_ids)}
        | {name: replies[index].text for name, replies in answers.items()}
        for index, t in enumerate(trials)
        if t.number == 0
    ]


if __name__ == "__main__":
    run_job(main)
