"""Refuse log decays out of range for the fixed chunks of the Triton kernels, without waiting for the GPU.

Inside a chunk of C tokens the exponents reach (C/2 + 1) |log decay|; past 88 fp32 overflows and the output is not
finite. The smallest and largest log decay of a call are reduced on the device and copied to the host while the GPU
works on; the next call, or `settle`, reads those that have arrived. So no error is silent: the output is
not finite at once, and the error with the reason follows, usually with the next layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import local
from typing import Any

import torch
from torch import Tensor

_MAX_EXPONENT = 87.0  # exp(88.7) is the end of fp32
_MOST_WAITING = 256  # pending copies; a queue this long means that none was read for hundreds of calls


class LogDecayRangeError(ValueError):
    """An earlier call's log decay was out of its kernels' safe range: its output is invalid."""


def widest_log_decay(chunk: int) -> float:
    """The strongest log decay per token (a positive number) that kernels with chunks of this length compute exactly."""
    return _MAX_EXPONENT / (chunk // 2 + 1)


@dataclass
class _Waiting:
    extremes: Tensor  # [2] on the host: smallest and largest log decay
    arrived: Any  # a CUDA event, or None if the values are on the host already
    widest: float
    shape: tuple[int, ...]


class DecayWatch:
    """Checks the log decays of calls; raises for one out of range as soon as the host has its values."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._here = local()

    @property
    def looks(self) -> bool:
        """Whether calls of this thread are checked now."""
        return not getattr(self._here, "bounded", False)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Calls inside, of this thread, are not checked: their log decays are in range by how they are computed. A
        check is six launches, which a short prompt waits for."""
        before, self._here.bounded = not self.looks, True
        try:
            yield
        finally:
            self._here.bounded = before

    def look(self, log_decay: Tensor, widest: float) -> None:
        """Record this call's log decay, of at most `widest` in magnitude, and raise for an earlier one out of range.

        No host synchronisation. Nothing is recorded while a CUDA graph is captured: graphs repeat calls that were
        checked before. Raises LogDecayRangeError in one line.
        """
        if self.looks and not (log_decay.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.note(torch.stack(torch.aminmax(log_decay.detach())).float(), widest, tuple(log_decay.shape))

    def note(self, extremes: Tensor, widest: float, shape: tuple[int, ...]) -> None:
        """As `look`, for kernels that find the smallest and largest log decay [2] themselves."""
        self._raise_for_arrived()
        if extremes.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        arrived = None
        if extremes.is_cuda:
            host = torch.empty(2, pin_memory=True, device="cpu")
            host.copy_(extremes, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            extremes = host
        if len(self._waiting) == _MOST_WAITING:
            self._raise_for_arrived(wait=True)
        self._waiting.append(_Waiting(extremes, arrived, widest, shape))

    def settle(self) -> None:
        """Wait for every recorded call and raise for one out of range: for places where the host waits anyway, and
        tests."""
        self._raise_for_arrived(wait=True)

    def _raise_for_arrived(self, *, wait: bool = False) -> None:
        while self._waiting:
            first = self._waiting[0]
            if first.arrived is not None:
                if wait:
                    first.arrived.synchronize()
                elif not first.arrived.query():
                    return
            self._waiting.popleft()
            low, high = first.extremes.tolist()
            if low < -first.widest or high > first.widest:
                self._waiting.clear()
                worst = low if low < -first.widest else high
                raise LogDecayRangeError(
                    f"wkv7: an earlier call {first.shape} had a log decay of {worst:.3g}; the Triton kernels take at "
                    f"most {first.widest:.3g} in size, and RWKV-7's lies in [-0.6065, 0]. Do not trust its output; "
                    "pass backend='chunked', which takes any decay"
                )


WATCH = DecayWatch()
