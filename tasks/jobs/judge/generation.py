"""Continuations by a model of many prompts, greedy or sampled, divided over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.judge.batching.budget import Rows
from radlads.tasks.jobs.judge.batching.recorded_decoding import MakeRecorder, continue_recorded
from radlads.tasks.jobs.judge.divided import in_step, is_divided
from radlads.tasks.jobs.judge.judged_models import continue_ids
from radlads.tasks.jobs.judge.written.sampling import GumbelNoise, Sampling
from radlads.tasks.jobs.process_group import gather

logger = logging.getLogger("radlads")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """What a model continues."""

    ids: list[int]
    length: int
    """Nominal, in tokens; prompts of one length are generated together."""
    new_tokens: int
    """Generated at most."""


def answer_prompts(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    rows: Rows,
    progress: Callable[[int], None],
    make_recorder: MakeRecorder | None = None,
) -> list[str | None]:
    """The model's greedy answers in the order of the prompts, on every rank; each rank generates its share. None: does
    not fit in memory. make_recorder: of steps, where they are to be recorded. Collective."""

    def run(chosen: Sequence[int]) -> list[str | None]:
        ids, new_tokens = [prompts[i].ids for i in chosen], prompts[chosen[0]].new_tokens
        return generate(model, tokenizer, ids, new_tokens, make_recorder)

    return run_batches(job, model, prompts, rows, run, progress)


def run_batches(
    job: Job,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    rows: Rows,
    run: Callable[[Sequence[int]], list[Result]],
    progress: Callable[[int], None],
) -> list[Result]:
    """One result for each prompt, in order, on every rank. run: indices of prompts that are alike → their results, by
    passes of the model. rows: of prompts of a length, answer included. Collective."""
    own: dict[int, Result] = {}
    with in_step(model):
        for chosen in _batches(prompts, rows, job.world_size)[job.rank :: job.world_size]:
            own |= dict(zip(chosen, run(chosen), strict=True))
            progress(min(len(prompts), len(own) * job.world_size))
    results: dict[int, Result] = {}
    for part in gather(own, job.world_size):
        results |= part
    return [results[index] for index in range(len(prompts))]


def _batches(prompts: Sequence[Prompt], rows: Rows, num_ranks: int) -> list[list[int]]:
    """Batches of indices of prompts that are alike, longest first, so that memory limits show early; inside, rows of
    nearly the same length are together. No more rows than give every rank some."""
    batches: list[list[int]] = []
    for kind in sorted({(prompt.length, prompt.new_tokens) for prompt in prompts}, reverse=True):
        chosen = [i for i, prompt in enumerate(prompts) if (prompt.length, prompt.new_tokens) == kind]
        chosen.sort(key=lambda i: (-len(prompts[i].ids), i))
        longest = max(kind[0], len(prompts[chosen[0]].ids)) + kind[1]
        size = min(rows(longest), -(-len(chosen) // num_ranks))
        batches += [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return batches


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    make_recorder: MakeRecorder | None = None,
) -> list[str | None]:
    """Greedy continuations as text; None for a prompt that does not fit in memory."""
    rows = continuations(model, tokenizer, prompts, max_new_tokens, make_recorder=make_recorder)
    texts = iter(tokenizer.batch_decode([row for row in rows if row is not None], skip_special_tokens=True))
    return [None if row is None else next(texts) for row in rows]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    make_recorder: MakeRecorder | None = None,
) -> list[list[int] | None]:
    """New tokens of each prompt up to EOS, which is the last one if it came, with cache, left-padded; None for a prompt
    that does not fit in memory. sampling None: greedy, whose steps make_recorder's recorder may replay.

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
    given = {} if sampling is None else {"logits_processor": LogitsProcessorList([GumbelNoise(sampling, model.device)])}
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": pad}
    try:
        new_BN = None
        if sampling is None and make_recorder is not None:
            new_BN = continue_recorded(model, ids_BT, mask_BT, max_new_tokens, eos, make_recorder)
        if new_BN is None:
            new_BN = continue_ids(model, ids_BT, mask_BT, given=given, **options)[:, width:]
    except torch.OutOfMemoryError:
        if is_divided(model):
            raise
        torch.cuda.empty_cache()
        if len(prompts) == 1:
            logger.warning("a prompt of %d tokens does not fit in memory; this length is not run", width)
            return [None]
        half = len(prompts) // 2
        parts = (slice(half), slice(half, None))
        halves = [(prompts[part], None if sampling is None else sampling.of(part)) for part in parts]
        return [
            row
            for some, how in halves
            for row in continuations(model, tokenizer, some, max_new_tokens, how, make_recorder)
        ]
    rows: list[list[int]] = new_BN.tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]
