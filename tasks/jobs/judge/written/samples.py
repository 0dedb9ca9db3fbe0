"""Samples of teacher and student to the same prompts, and the teacher's nats of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.generation import EvalGeneration
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.data.text.documents import RowReader, read_file
from radlads.tasks.jobs.data.text.token_encoder import prompt_frame, text_ids
from radlads.tasks.jobs.judge.batching.budget import RowBudget, Rows
from radlads.tasks.jobs.judge.batching.row_scores import ScoredRow, score_rows
from radlads.tasks.jobs.judge.generation import Prompt, continuations, run_batches
from radlads.tasks.jobs.judge.heldout_scores import Estimate, mean_of, ratio_of
from radlads.tasks.jobs.judge.judged_models import STUDENT, TEACHER
from radlads.tasks.jobs.judge.written.repetition import distinct, ends_in_loop, repeated_share
from radlads.tasks.jobs.judge.written.sampling import Sampling, sample_seed
from radlads.tasks.jobs.sources import expand_paths

_CHARACTERS_PER_TOKEN = 32  # more than any tokenizer's average
_SHOWN = 3

Progress = Callable[[int], None]


def sample_prompts(section: EvalGeneration, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> list[Prompt]:
    """The prompt of every sample. add_bos: as prompt_frame takes it. Without files: BOS alone, else EOS. Raises
    UserError for unreadable files, and where no document has a token."""
    if not section.prompts:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [Prompt([start], 1, section.new_tokens)] * section.samples
    reader = RowReader(section.text_field)
    documents = (
        document.text or ""
        for name in expand_paths(section.prompts)
        for document in read_file(name, reader, separator=section.prompts_separator)
    )
    texts = [text[: section.prompt_tokens * _CHARACTERS_PER_TOKEN] for text in islice(documents, section.samples)]
    beginnings = [ids[: section.prompt_tokens] for ids in text_ids(tokenizer, texts) if ids]
    if not beginnings:
        raise UserError("no document of the prompts has a token; name files with text in evaluate.generation.prompts")
    before = prompt_frame(tokenizer, add_bos).before
    return [
        Prompt([*before, *beginnings[i % len(beginnings)]], section.prompt_tokens, section.new_tokens)
        for i in range(section.samples)
    ]


def judge_samples(
    job: Job,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    section: EvalGeneration,
    prompts: Sequence[Prompt],
    temperature: float,
    budget: RowBudget,
) -> dict[str, Any]:
    """{temperature, teacher, student, nats_ratio, examples} of one temperature. Collective.

    Of a model: `nats`, the teacher's of a token (at temperature 1, EOS counted), `distinct_1`, `_2`, `_4`, `repeated`,
    `loops`, `stopped`, `length` in tokens without EOS; {value, stderr} over samples. nats_ratio: student's samples over
    the teacher's, paired by prompt. Both models draw with the same noise.
    """
    sums: dict[str, np.ndarray] = {}
    sheet: dict[str, Any] = {"temperature": temperature}
    texts: dict[str, list[str]] = {}
    eos = tokenizer.eos_token_id
    seeds = [sample_seed(section.seed, f"{temperature:g}", i) for i in range(len(prompts))]

    def progress(done: int) -> Progress:
        return lambda count: job.progress(done + count, 4 * len(prompts), f"samples at temperature {temperature:g}")

    for number, (name, model) in enumerate(models.items()):
        done = 2 * number * len(prompts)

        def write(chosen: Sequence[int], model: PreTrainedModel = model) -> list[list[int] | None]:
            sampling = Sampling(temperature, [seeds[i] for i in chosen])
            return continuations(model, tokenizer, [prompts[i].ids for i in chosen], section.new_tokens, sampling)

        rows = _all_run(run_batches(job, model, prompts, budget.writes, write, progress(done)))
        nats = teacher_nats(job, models[TEACHER], prompts, rows, budget.reads, progress(done + len(prompts)))
        sums[name] = np.array([nats, [len(row) for row in rows]], dtype=np.float64)
        sheet[name] = {"nats": ratio_of(*sums[name]), **_counted(rows, eos)}
        texts[name] = tokenizer.batch_decode(rows[:_SHOWN], skip_special_tokens=True)
    sheet["nats_ratio"] = _ratio_of_ratios(sums[STUDENT], sums[TEACHER])
    starts = tokenizer.batch_decode([prompt.ids for prompt in prompts[:_SHOWN]], skip_special_tokens=True)
    sheet["examples"] = [
        {"prompt": start} | {name: own[i] for name, own in texts.items()} for i, start in enumerate(starts)
    ]
    return sheet


def _all_run(rows: Sequence[list[int] | None]) -> list[list[int]]:
    run = [row for row in rows if row is not None]
    if len(run) < len(rows):
        raise UserError("evaluate.generation: a sample does not fit in memory; lower its new_tokens or prompt_tokens")
    return run


def teacher_nats(
    job: Job,
    teacher: PreTrainedModel,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[int]],
    reads: Rows,
    progress: Progress,
) -> list[float]:
    """−log p(row | prompt) of each continuation by the teacher, summed over its tokens, in nats. Collective."""

    def score(chosen: Sequence[int]) -> list[float]:
        texts = [ScoredRow((*prompts[i].ids, *rows[i][:-1]), (tuple(rows[i]),)) for i in chosen]
        return [-float(own.double().sum()) for ((own, _),) in score_rows(teacher, texts, torch.float32)]

    return run_batches(job, teacher, prompts, reads, score, progress)


def _counted(rows: Sequence[list[int]], eos: int) -> dict[str, Estimate]:
    """What is counted of each sample, without its EOS."""
    texts = [row[:-1] if row[-1:] == [eos] else row for row in rows]
    stopped = [float(row[-1:] == [eos]) for row in rows]
    return {
        **{f"distinct_{n}": _mean([distinct(text, n) for text in texts]) for n in (1, 2, 4)},
        "repeated": _mean([repeated_share(text) for text in texts]),
        "loops": _mean([float(ends_in_loop(text)) for text in texts]),
        "stopped": _mean(stopped),
        "length": _mean([float(len(text)) for text in texts]),
    }


def _mean(values: Sequence[float | None]) -> Estimate:
    """Over the samples that have a value; {None, None} without one."""
    known = [value for value in values if value is not None]
    return mean_of(np.array(known)) if known else {"value": None, "stderr": None}


def _ratio_of_ratios(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """(Σ above / Σ below) of ours over that of theirs, rows [above, below] of paired samples; error by the delta
    method."""
    rates = [float(above.sum() / below.sum()) for above, below in (ours, theirs)]
    if rates[1] == 0:  # the teacher was certain of every token
        return {"value": None, "stderr": None}
    relative = [
        (above - rate * below) / above.sum() if above.sum() else np.zeros_like(above)
        for rate, (above, below) in zip(rates, (ours, theirs), strict=True)
    ]
    count, value = len(relative[0]), rates[0] / rates[1]
    spread = ((relative[0] - relative[1]) ** 2).sum() * count / (count - 1)
    return {"value": value, "stderr": float(value * np.sqrt(spread))}
