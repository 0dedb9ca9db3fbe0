"""`evaluate.texts`: texts that teacher and final student are scored on from the first token to the last."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.texts import EvalText
from radlads.tasks.contracts.recipe.sections import Evaluate
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.data.encode import bytes_per_token
from radlads.tasks.jobs.data.text.documents import RowReader, read_file
from radlads.tasks.jobs.data.text.token_encoder import TokenEncoder, prompt_frame
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.divided import in_step
from radlads.tasks.jobs.judge.heldout_scores import SUMS, Windows, check_finite, ratio_of, score_windows
from radlads.tasks.jobs.judge.judged_models import STUDENT, TEACHER
from radlads.tasks.jobs.process_group import gather
from radlads.tasks.jobs.sources import expand_paths

logger = logging.getLogger("radlads")

_LN2 = float(np.log(2))


@dataclass(frozen=True)
class Stream:
    """The tokens of a text's documents, one after the other. Their first one is a marker and only read."""

    ids: np.ndarray
    """[tokens]"""
    num_bytes: np.ndarray
    """UTF-8 bytes that each token represents; 0 for markers. [tokens]"""
    markers: tuple[int, ...]

    @property
    def labels(self) -> int:
        """Number of tokens that are scored."""
        return len(self.ids) - 1

    def windows(self, first: int, count: int, context: int) -> Windows:
        """Consecutive windows of `context` labels, from label `first`."""
        sizes = self.num_bytes[first + 1 : first + 1 + count * context].reshape(count, context).sum(axis=1)

        def rows_of(rows: Any) -> torch.Tensor:
            starts = [first + row * context for row in rows]
            return torch.from_numpy(np.stack([self.ids[start : start + context + 1] for start in starts]))

        return Windows(rows_of, sizes, context, False, self.markers)


def read_stream(text: EvalText, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> Stream:
    """The text as a stream: EOS between documents, BOS before each as prompt_frame decides, at least one marker first.
    Raises UserError for unreadable files, and without a token of text."""
    encoder, eos = TokenEncoder(tokenizer), tokenizer.eos_token_id
    before = prompt_frame(tokenizer, add_bos).before
    reader = RowReader(text.text_field)
    ids, sizes = [np.array(before or [eos], np.int64)], [np.zeros(1, np.int64)]
    for name in expand_paths(text.paths):
        for document in read_file(name, reader, separator=text.separator):
            ((own, spans),) = encoder.encode_texts([document.text or ""], offsets=True)
            if not own:
                continue
            between = [eos, *before] if len(ids) > 1 else []
            ids.append(np.array([*between, *own], np.int64))
            sizes.append(np.pad(bytes_per_token(document.text or "", spans, len(own)), (len(between), 0)))
    if len(ids) == 1:
        raise UserError(f"evaluate.texts: '{text.name}' has no token of text")
    return Stream(np.concatenate(ids), np.concatenate(sizes), tuple({eos, *before}))


def check_text(text: EvalText) -> None:
    """Read the first document, for the plan. Raises UserError where there is none."""
    reader = RowReader(text.text_field)
    for name in expand_paths(text.paths):
        if any(document.text for document in islice(read_file(name, reader, separator=text.separator), 1)):
            return
    raise UserError(f"'{text.name}' has no text")


def judge_texts(
    job: Job,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    section: Evaluate,
    budget: RowBudget,
) -> dict[str, Any]:
    """{texts: {name: {context, tokens, bytes, teacher: {bits_per_byte}, student: {bits_per_byte, bits_per_byte_ratio,
    kl, top1_agreement}}}}, {value, stderr} each; {} without texts. models: teacher and student. Collective."""
    found = {text.name: _judge_text(job, models, tokenizer, section, budget, text) for text in section.texts}
    return {"texts": found} if found else {}


def _judge_text(
    job: Job,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    section: Evaluate,
    budget: RowBudget,
    text: EvalText,
) -> dict[str, Any]:
    stream = read_stream(text, tokenizer, section.add_bos)
    count, rest = divmod(stream.labels, text.context)
    scores: dict[int, list[float]] = {}
    sizes = [np.zeros(0, np.int64)]
    with in_step(models[TEACHER], models[STUDENT]):
        own: dict[int, list[float]] = {}
        if count:
            windows, mine = stream.windows(0, count, text.context), range(job.rank, count, job.world_size)
            sizes.append(windows.num_bytes)
            own |= score_windows(
                models[TEACHER],
                models[STUDENT],
                windows,
                batch=budget.reads(text.context),
                mine=mine,
                progress=lambda done: job.progress(done, len(mine), f"windows of {text.name}"),
            )
        if rest:
            last = stream.windows(count * text.context, 1, rest)
            sizes.append(last.num_bytes)
            if job.rank == 0:
                numbered = replace(last, input_ids=lambda _: last.input_ids([0]))
                own |= score_windows(models[TEACHER], models[STUDENT], numbered, batch=1, mine=[count])
    for part in gather(own, job.world_size):
        scores |= part
    sums = np.array([scores[row] for row in range(len(scores))])
    tokens = np.array([text.context] * count + [rest] * bool(rest))
    summary = _summarize(sums, np.concatenate(sizes), tokens)
    check_finite(STUDENT, summary[STUDENT])
    logger.info("%s: bits per byte ×%.4f", text.name, summary[STUDENT]["bits_per_byte_ratio"]["value"])
    whole = {"context": text.context, "tokens": stream.labels, "bytes": int(stream.num_bytes.sum())}
    return whole | summary


def _summarize(sums: np.ndarray, num_bytes: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """From sums [windows, SUMS]; windows weigh by what they hold."""
    column = dict(zip(SUMS, sums.T, strict=True))
    theirs, ours = column["teacher nll of text"], column["student nll of text"]
    return {
        TEACHER: {"bits_per_byte": ratio_of(theirs / _LN2, num_bytes)},
        STUDENT: {
            "bits_per_byte": ratio_of(ours / _LN2, num_bytes),
            "bits_per_byte_ratio": ratio_of(ours, theirs),
            "kl": ratio_of(column["KL"], tokens),
            "top1_agreement": ratio_of(column["top-1 agreement"], tokens),
        },
    }


def flatten_texts(sheet: dict[str, Any]) -> dict[str, float]:
    """The numbers under their MLflow names: `text/wikitext2/student/bits_per_byte`, `text/wikitext2/kl`."""
    flat: dict[str, float] = {}
    for name, found in sheet.get("texts", {}).items():
        for model in (TEACHER, STUDENT):
            for key, estimate in found[model].items():
                at = f"text/{name}/{f'{model}/' if key == 'bits_per_byte' else ''}{key}"
                flat[at] = estimate["value"]
                if estimate["stderr"] is not None:
                    flat[f"{at}_stderr"] = estimate["stderr"]
    return flat
