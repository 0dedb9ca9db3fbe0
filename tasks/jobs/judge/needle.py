"""The needle job: retrieval of a fact at a given depth of a text of a given length, by greedy generation and string
match; and, where the recipe asks for it, RULER's tasks (judge/ruler).

Teacher and students get identical prompts. A length that does not fit in memory is reported as not run and excluded
from all means.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.model.student.decoding.recorder import Recorder
from radlads.tasks.contracts.recipe.sections import Needle
from radlads.tasks.contracts.specs import NeedleSpec
from radlads.tasks.jobs.common import Job, run_job, write_json
from radlads.tasks.jobs.data.text.chat import ChatTemplate, open_chat_template
from radlads.tasks.jobs.data.text.recall import Case, build_case, load_filler
from radlads.tasks.jobs.data.text.token_encoder import BARE, TokenEncoder, prompt_frame
from radlads.tasks.jobs.judge.batching.budget import row_budget
from radlads.tasks.jobs.judge.batching.recorded_decoding import records_steps
from radlads.tasks.jobs.judge.generation import Prompt, answer_prompts
from radlads.tasks.jobs.judge.heatmap import draw_heatmap
from radlads.tasks.jobs.judge.judged_models import (
    TEACHER,
    open_teacher,
    open_tokenizer,
    opened_student,
    student_names,
)
from radlads.tasks.jobs.judge.needle_grid import flatten, make_cells, summarize
from radlads.tasks.jobs.judge.ruler.prompts import make_ruler_trials
from radlads.tasks.jobs.judge.ruler.sheet import flatten_ruler, ruler_sheet
from radlads.tasks.jobs.origin import check_judged
from radlads.tasks.jobs.sources import expand_paths, resolve_file
from radlads.tasks.jobs.train.engines.pass_graphs import PassRecorder

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
    trials, threads = make_trials(section, tokenizer), job.spec.resources.threads
    asked = make_ruler_trials(section, tokenizer, threads=threads, rank=job.rank, ranks=job.world_size)
    prompts = [Prompt(t.case.prompt_ids, t.length, section.max_new_tokens) for t in trials] + [t.prompt for t in asked]
    answers: dict[str, list[Answer]] = {}
    replies: dict[str, list[str | None]] = {}
    seconds: dict[str, float] = {}

    def record() -> Recorder:
        return PassRecorder(job.device)

    def run(name: str, *models: PreTrainedModel) -> None:
        model, rows = models[-1], row_budget(job, section, models).writes
        start, done = time.monotonic(), len(answers) * len(prompts)
        total = len(prompts) * (1 + len(names))
        texts = answer_prompts(
            job,
            model,
            tokenizer,
            prompts,
            rows,
            lambda n: job.progress(done + n, total, "prompts"),
            record if records_steps(job.spec.resources, models[0].num_parameters()) else None,
        )
        answers[name] = [
            Answer(text, text is not None and is_hit(text, trial.case.answer))
            for text, trial in zip(texts, trials, strict=False)
        ]
        replies[name] = texts[len(trials) :]
        seconds[name] = time.monotonic() - start
        hits = sum(answer.hit for answer in answers[name])
        logger.info("%s: %d of %d needles found in %.1f s", name, hits, len(trials), seconds[name])

    teacher = open_teacher(job, spec.teacher)
    run(TEACHER, teacher)
    for name in names:
        with opened_student(job, name) as student:
            run(name, teacher, student)
    if job.rank != 0:
        return None
    hits = {name: [None if a.text is None else a.hit for a in found] for name, found in answers.items()}
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
    numbers = flatten(sheet)
    if section.ruler is not None:
        sheet["ruler"] = ruler_sheet(section.ruler, asked, replies)
        numbers |= flatten_ruler(sheet["ruler"])
    write_json(job.output / "needle.json", sheet)
    draw_heatmap(sheet, job.output / "needle.png")
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
    text, ids = template.prompt_ids(case.prompt, add_bos=section.add_bos)
    return Case(text, ids, case.answer)


def is_hit(text: str, answer: str) -> bool:
    """Whether the text contains the answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


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
