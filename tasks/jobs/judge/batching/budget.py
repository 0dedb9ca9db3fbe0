"""How many rows a judging pass takes: those that a recipe asks for, or as many as fit into a budget of tokens.

The budget is what half of the free memory of a device holds, up to the size at which a pass is long enough that
launches no longer matter. It depends on the networks' sizes and on the device's whole memory, never on what happens to
be free, so that it is the same at every attempt. Plan and job compute it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from transformers import PreTrainedModel

from radlads.tasks.contracts.recipe.sections import Evaluate, Needle
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.process_group import gather

OVERHEAD_BYTES = {"cuda": 2 * 1024**3, "cpu": 600 * 1024**2}
"""GPU: context, NCCL buffers, fragmentation. CPU: the interpreter and its libraries."""
LOGITS = {"cuda": 2**26, "cpu": 2**23}
"""Logits that are made at once, of one network: positions × vocabulary."""
_LOGIT_BYTES = 24  # of each: of two networks as they are made, and in fp32 four times while they are compared
# A pass of so many tokens computes longer than it takes to launch, even for 30 layers of width 576 on an H100.
_READ = {"cuda": 65_536, "cpu": 4_096}
# Prompts and answers that are written at once: a step takes the same time for any number of rows.
_WRITTEN = {"cuda": 262_144, "cpu": 16_384}
_SHARE = 0.5  # of the free memory; the rest is a margin for fragmentation and for the error of the estimate

Rows = Callable[[int], int]
"""Length of a row in tokens → rows of a pass, at least one."""


class JudgedSizes(Protocol):
    """Sizes of a teacher and its student."""

    @property
    def hidden(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def intermediate(self) -> int: ...

    @property
    def kv_width(self) -> int: ...

    @property
    def vocab(self) -> int: ...

    @property
    def num_softmax(self) -> int: ...


@dataclass(frozen=True)
class ConfigSizes:
    """Read from a teacher's config."""

    hidden: int
    width: int
    """Query heads × head width."""
    head_dim: int
    intermediate: int
    """Width of an MLP; with experts, of all that a token is routed to."""
    kv_width: int
    vocab: int
    num_softmax: int
    """At most: layers whose keys and values are kept."""


@dataclass(frozen=True)
class RowBudget:
    """rows: that the recipe asks for; None: as many as fit. reading, writing: tokens of a pass, and of prompts and
    answers that are written together; a row that is longer is read alone."""

    rows: int | None
    reading: int = 0
    writing: int = 0

    def reads(self, length: int) -> int:
        """Rows of a pass without a cache."""
        return self.rows or max(1, self.reading // max(1, length))

    def writes(self, length: int) -> int:
        """Rows that are continued at once. length: of prompt and answer."""
        return self.rows or max(1, self.writing // max(1, length))


def read_sizes(config: Any) -> ConfigSizes:
    """config: the teacher's, of transformers."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "moe_intermediate_size", None)
    return ConfigSizes(
        hidden=config.hidden_size,
        width=heads * head_dim,
        head_dim=head_dim,
        intermediate=int(config.num_experts_per_tok * experts if experts else config.intermediate_size),
        kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocab=config.vocab_size,
        num_softmax=config.num_hidden_layers,
    )


def token_bytes(sizes: JudgedSizes, word: int, *, written: int = 0) -> int:
    """Of a token of a pass without gradients: the layer that computes, a mixer's inputs, decays and chunk states among
    it. written: the length of rows that are continued; then its keys and values, and its row of the padding's mask."""
    layer = (8 * sizes.hidden + 16 * sizes.width + 3 * sizes.intermediate) * word
    if not written:
        return layer
    return layer + sizes.num_softmax * 2 * sizes.kv_width * word + (1 + word) * written


def logit_bytes(sizes: JudgedSizes, device: str) -> int:
    """Of the logits that two networks' scores are made of, in pieces."""
    return max(LOGITS[device], sizes.vocab) * _LOGIT_BYTES


def fit_rows(
    section: Evaluate | Needle, sizes: JudgedSizes, *, word: int, device: str, memory: int, weights: int
) -> RowBudget:
    """memory: bytes of the device; weights: bytes of the networks on it."""
    if section.batch is not None:
        return RowBudget(section.batch)
    free = _SHARE * (memory - weights - OVERHEAD_BYTES[device] - logit_bytes(sizes, device))
    reading = int(max(0.0, free) // token_bytes(sizes, word))
    writing = int(max(0.0, free) // token_bytes(sizes, word, written=section.longest))
    return RowBudget(None, min(reading, _READ[device]), min(writing, _WRITTEN[device]))


def row_budget(job: Job, section: Evaluate | Needle, models: Iterable[PreTrainedModel]) -> RowBudget:
    """The same on every rank. models: those that are on the device, the teacher first. Collective."""
    if section.batch is not None:
        return RowBudget(section.batch)
    teacher, *others = models
    device = job.device.type
    if device == "cuda":
        memory = torch.cuda.get_device_properties(job.device).total_memory
    else:
        memory = psutil.virtual_memory().total // job.world_size
    held = sum(_bytes_held(model) for model in (teacher, *others))
    sizes = read_sizes(teacher.config)
    own = fit_rows(section, sizes, word=job.dtype.itemsize, device=device, memory=memory, weights=held)
    every = gather((own.reading, own.writing), job.world_size)
    return RowBudget(None, min(reading for reading, _ in every), min(writing for _, writing in every))


def _bytes_held(model: PreTrainedModel) -> int:
    """Of a model's parameters on this rank, which may hold a part of each."""
    parts: list[Any] = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)
