"""Training text sampled from the teacher, for use without a corpus."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.recipe.recipe import SampleSource
from radlads.tasks.contracts.specs import TeacherRef
from radlads.tasks.jobs.common import Job, write_json
from radlads.tasks.jobs.data.prompts import first_ids, read_prompts
from radlads.tasks.jobs.judge.judged_models import continue_ids, open_teacher
from radlads.tasks.jobs.process_group import gather

logger = logging.getLogger("radlads")


def sample_sources(
    job: Job, sources: dict[int, SampleSource], teacher: TeacherRef, tokenizer: PreTrainedTokenizerBase
) -> dict[int, Path]:
    """Sample every source; returns source index → its jsonl file of {"text"}. Collective: the ranks share the work.

    Finished batches are kept in the job's scratch folder and reused after a restart.
    """
    if not sources:
        return {}
    model = open_teacher(job, teacher)
    return {index: _sample_source(job, index, source, model, tokenizer) for index, source in sources.items()}


def _sample_source(
    job: Job, index: int, source: SampleSource, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    folder = job.scratch / "samples" / f"{job.spec.digest[:16]}-{index}"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(source, tokenizer) if source.prompts else []
    texts: list[str] = []
    tokens = 0
    first = 0
    while tokens < source.tokens:
        # One round is one batch per rank. Surplus texts are discarded: the result does not depend on the rank count.
        mine = folder / f"batch-{first + job.rank:06d}.json"
        if not mine.exists():
            write_json(mine, sample_batch(model, tokenizer, source, prompts, batch=first + job.rank))
        # Gathered, not read: the ranks of another host have their batches there.
        for batch in gather(json.loads(mine.read_text(encoding="utf-8")), job.world_size):
            for row in batch:
                if tokens < source.tokens:
                    texts.append(row["text"])
                    tokens += row["tokens"]
        first += job.world_size
        job.progress(min(tokens, source.tokens), source.tokens, "tokens sampled")
    path = folder / "samples.jsonl"
    if job.rank == 0:
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
        logger.info("sampled %d documents, %d tokens, from the teacher", len(texts), tokens)
    job.barrier()
    return path


@torch.no_grad()
def sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: SampleSource,
    prompts: list[list[int]],
    *,
    batch: int,
) -> list[dict[str, str | int]]:
    """Sample one batch: [{"text", "tokens"}], a pure function of the source's seed, the prompts and the batch number.

    A row starts from BOS, else from EOS, else from a random token, and goes on with its prompt (token ids), if there
    are any. It ends at EOS or at the context length.
    """
    seed = hashlib.sha256(f"{source.seed}:{batch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    mask_BT: Tensor | None = None
    if start is None:
        first_BT = torch.randint(model.config.vocab_size, (source.batch, 1), generator=generator)
    elif prompts:
        first_BT, mask_BT = first_ids(prompts, batch, source.batch, start, tokenizer.eos_token_id)
    else:
        first_BT = torch.full((source.batch, 1), start)
    given = first_BT.shape[1]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(seed[7:14], "big"))
        rows_BT = continue_ids(
            model,
            first_BT,
            mask_BT,
            do_sample=True,
            temperature=source.temperature,
            top_p=source.top_p,
            top_k=0,
            max_new_tokens=source.context - given,
            cache_implementation="static" if source.static_cache else None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    sampled: list[dict[str, str | int]] = []
    begun = 0 if start is None else given
    for number, row in enumerate(rows_BT[:, begun:].tolist()):
        ids = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
        if mask_BT is not None:
            ids = first_BT[number, given - int(mask_BT[number].sum()) + 1 :].tolist() + ids
        # A row truncated at the context length can end in the middle of a character.
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip("�").strip()
        if text:
            sampled.append({"text": text, "tokens": len(ids) + 1})
    return sampled
