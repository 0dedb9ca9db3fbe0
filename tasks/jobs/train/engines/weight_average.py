"""The exponential moving average of what trains, beside the masters of whichever engine: exported in their place.

    a ← a + (1 − min(d, (1 + n) / (10 + n))) (w − a)      after optimizer step n, from 1

The smaller decay of the first steps (as in TensorFlow's ExponentialMovingAverage) forgets the weights that training
began with. The average is fp32: at a decay of 0.999 a step adds a thousandth of a difference that is small itself,
which bf16 would round away, and bf16 with a compensation takes as many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from radlads.tasks.jobs.checkpoints.state_slices import AVERAGE, StateSlice


class WeightAverage:
    """Of the masters that a rank holds, on their device."""

    def __init__(self, held: Sequence[StateSlice], decay: float) -> None:
        """held: the engine's state before the first step; the masters stay where they are for good."""
        self.decay = decay
        self._masters = [one.tensors["param"] for one in held]
        self._averages = [master.clone() for master in self._masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        if self._masters:
            torch._foreach_lerp_(self._averages, self._masters, 1 - min(self.decay, (1 + step) / (10 + step)))

    def beside(self, held: Sequence[StateSlice]) -> list[StateSlice]:
        """The engine's state, the average with it."""
        return [
            replace(one, tensors={**one.tensors, AVERAGE: average})
            for one, average in zip(held, self._averages, strict=True)
        ]

    @torch.no_grad()
    def replace_masters(self) -> None:
        """Write the average over the masters."""
        for master, average in zip(self._masters, self._averages, strict=True):
            master.copy_(average)
