"""Greedy answers of a model to many prompts, divided over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.judge.divided import in_step, is_divided
from radlads.tasks.jobs.judge.judged_models import continue_ids
from radlads.tasks.jobs.process_group import gather

logger = logging.getLogger("radlads")


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
    batch: int,
    progress: Callable[[int], None],
) -> list[str | None]:
    """The model's answers in the order of the prompts, on every rank; each rank generates its share. None: does not fit
    in memory. Collective."""
    batches = _batches(prompts, batch)
    own: dict[int, str | None] = {}
    with in_step(model):
        for count, chosen in enumerate(batches[job.rank :: job.world_size], start=1):
            new_tokens = prompts[chosen[0]].new_tokens
            texts = generate(model, tokenizer, [prompts[i].ids for i in chosen], new_tokens)
            own |= dict(zip(chosen, texts, strict=True))
            progress(min(len(prompts), count * batch * job.world_size))
    answers: dict[int, str | None] = {}
    for part in gather(own, job.world_size):
        answers |= part
    return [answers[index] for index in range(len(prompts))]


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Batches of indices of prompts that are alike, longest first, so that memory limits show early."""
    batches: list[list[int]] = []
    for kind in sorted({(prompt.length, prompt.new_tokens) for prompt in prompts}, reverse=True):
        chosen = [i for i, prompt in enumerate(prompts) if (prompt.length, prompt.new_tokens) == kind]
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
