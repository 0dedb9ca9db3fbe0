"""`evaluate.speed`: time and memory of teacher and student, each alone on one device."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from radlads.model.student.decoding.recorder import CudaRecorder
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.judging.generation import EvalSpeed
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.judge.batching.recorded_decoding import continue_recorded
from radlads.tasks.jobs.judge.judged_models import TEACHER, continue_ids

logger = logging.getLogger("radlads")

REPEATS = 3
"""Runs that are measured, after one that is not."""
_NO_MEMORY = "does not fit in memory"


class _Clock(BaseStreamer):
    """Notes when `generate` begins and when each token is there; it hands over tokens that are on the host already."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to write."""


def check_speed(asked: EvalSpeed, positions: int | None, resources: JobResources) -> list[str]:
    """Warnings, for the plan. positions: that the teacher was made for. Raises UserError under ZeRO-3."""
    if resources.zero_stage == 3 and resources.processes > 1:
        raise UserError(
            "whole models on one device are measured, and resources.zero_stage: 3 divides them; leave `speed` out, or "
            "evaluate with a lower stage"
        )
    alone = [length for length in asked.lengths if _is_beyond(asked, length, positions)]
    if not alone:
        return []
    return [
        f"evaluate.speed.lengths {alone} are beyond the teacher's {positions} positions: the student runs alone there"
    ]


def judge_speed(job: Job, models: Mapping[str, PreTrainedModel], asked: EvalSpeed) -> dict[str, Any]:
    """{device, batch, new_tokens, repeats, lengths: [{length, <model>: measured or None, not_run: {<model>: why}}]}.

    measured: as `measure`. The first rank measures, while the others wait; elsewhere `lengths` is empty. Collective.
    """
    lengths: list[dict[str, Any]] = []
    if job.rank == 0:
        positions = getattr(models[TEACHER].config, "max_position_embeddings", None)
        lengths = [{"length": length, "not_run": {}} for length in sorted(asked.lengths)]
        for number, (name, model) in enumerate(models.items()):
            others = [other for other in models.values() if other is not model]
            with _set_aside(others, job.device):
                for count, row in enumerate(lengths, start=1):
                    beyond = name == TEACHER and _is_beyond(asked, row["length"], positions)
                    row[name] = None if beyond else measure(model, asked, row["length"])
                    if row[name] is None:
                        row["not_run"][name] = f"beyond its {positions} positions" if beyond else _NO_MEMORY
                    logger.info("%s at %d tokens: %s", name, row["length"], row[name])
                    job.progress(number * len(lengths) + count, len(models) * len(lengths), "lengths")
    job.barrier()
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else job.device.type
    settings = {"device": name, "batch": asked.batch, "new_tokens": asked.new_tokens, "repeats": REPEATS}
    return settings | {"lengths": lengths}


def _write(model: PreTrainedModel, ids_BT: torch.Tensor, new_tokens: int, clock: _Clock) -> None:
    """Generate so many tokens, without an EOS, so that every model writes as much. Both models replay recorded steps on
    a GPU: a student's generate() does so by itself, for the teacher it is done here."""
    if model.device.type == "cuda" and not isinstance(model, RadladsForCausalLM):
        clock.put(ids_BT)
        mask_BT, device = torch.ones_like(ids_BT), model.device
        if (
            continue_recorded(model, ids_BT, mask_BT, new_tokens, None, partial(CudaRecorder, device), clock.put)
            is not None
        ):
            return
        clock.times.clear()
    continue_ids(model, ids_BT, given={"streamer": clock}, do_sample=False, max_new_tokens=new_tokens)


def _is_beyond(asked: EvalSpeed, length: int, positions: int | None) -> bool:
    return positions is not None and length + asked.new_tokens + 1 > positions


@contextmanager
def _set_aside(models: list[PreTrainedModel], device: torch.device) -> Iterator[None]:
    """Models leave the GPU, so that memory is of what remains there. On a CPU there is nowhere to go."""
    if device.type == "cpu":
        yield
        return
    try:
        for model in models:
            torch.nn.Module.to(model, "cpu")
        yield
    finally:
        for model in models:
            torch.nn.Module.to(model, device)


def measure(model: PreTrainedModel, asked: EvalSpeed, length: int) -> dict[str, float | None] | None:
    """{prompt_seconds, tokens_per_second, memory_bytes} of `generate`, medians after a warm-up; None: it does not fit.

    prompt_seconds: until the first new token. tokens_per_second: of all sequences, by the median step after it, so that
    recording a step does not count. memory_bytes: the
    peak, weights included; None on a CPU.
    """
    on_gpu = model.device.type == "cuda"
    generator = torch.Generator().manual_seed(length)
    ids_BT = torch.randint(model.config.vocab_size, (asked.batch, length), generator=generator)
    reading, writing = list[float](), list[float]()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    try:
        for run in range(1 + REPEATS):
            clock = _Clock()
            _write(model, ids_BT, asked.new_tokens + 1, clock)
            start, first, *_ = clock.times
            if run > 0:
                reading.append(first - start)
                writing.append(statistics.median(after - before for before, after in pairwise(clock.times[1:])))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return {
        "prompt_seconds": statistics.median(reading),
        "tokens_per_second": asked.batch / statistics.median(writing),
        "memory_bytes": float(torch.cuda.max_memory_allocated(model.device)) if on_gpu else None,
    }
