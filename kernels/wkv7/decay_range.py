"""A log decay that the fixed chunks of the Triton kernels cannot take is refused, without waiting for the GPU.

Inside a chunk of C tokens the exponents reach (C/2 + 1) |log decay|; past 88 fp32 overflows and the output is not
finite. The smallest and largest log decay of a call are reduced on the device and copied to the host while the GPU
works on; the next call, or `settle`, reads those that have arrived. So nothing is ever wrong in silence: the output is
not finite at once, and the error that says why follows, usually with the next layer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_EXPONENT = 87.0  # exp(88.7) is the end of fp32
_MOST_WAITING = 256  # copies under way; a queue this long means that nobody looked for hundreds of calls


class LogDecayRangeError(ValueError):
    """An earlier call's log decay was beyond what its kernels take for sure: do not trust its output."""


def widest_log_decay(chunk: int) -> float:
    """The strongest log decay per token (a positive number) that kernels with chunks of this length take exactly."""
    return _MAX_EXPONENT / (chunk // 2 + 1)


@dataclass
class _Waiting:
    extremes: Tensor  # [2] on the host: smallest and largest log decay
    arrived: Any  # a CUDA event, or None if it is there already
    widest: float
    shape: tuple[int, ...]


class DecayWatch:
    """Looks at the log decays of calls as they pass; raises for a bad one as soon as the host can know it."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()

    def look(self, log_decay: Tensor, widest: float) -> None:
        """Note this call's log decay, which may be at most `widest` in size, and raise for an earlier one.

        No host synchronisation. While a CUDA graph is being captured nothing is noted: graphs replay what was tried.
        Raises LogDecayRangeError in one line.
        """
        if not (log_decay.is_cuda and torch.cuda.is_current_stream_capturing()):
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
        """Wait for every call noted so far and raise for a bad one: where the host waits anyway, or in a test."""
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
