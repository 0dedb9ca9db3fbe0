"""Sampling that depends on a seed alone, not on the batch, the rank or the model beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """How the prompts of a batch are continued."""

    temperature: float
    seeds: Sequence[int]
    """One for each prompt."""

    def of(self, part: slice) -> Sampling:
        """For a part of the batch."""
        return Sampling(self.temperature, self.seeds[part])


def sample_seed(*parts: object) -> int:
    """A seed of 56 bits from what names a sample."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


class GumbelNoise(LogitsProcessor):
    """Logits → logits / temperature + Gumbel noise, whose largest entry is a sample of the softmax (Maddison et al.
    2014, 1411.0030). Each row draws from a generator of its own, a vocabulary at a time."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._temperature = sampling.temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in sampling.seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: unused; scores: logits [B,V]."""
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, generator in zip(noise_BV, self._generators, strict=True):
            row_V.exponential_(generator=generator)
        return scores.float() / self._temperature - noise_BV.clamp_min(torch.finfo(torch.float32).tiny).log()
