"""A user's request to stop the run of this process, visible to all its jobs. Independent of the orchestrator.

A signal handler sets it, so it uses no locks, only plain attributes, each written by one thread.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

ORDERLY_SECONDS = 12.0
"""Seconds that a job gets to save a checkpoint after a stop request; short, because a user waits at a terminal."""


class RunStopped(Exception):  # noqa: N818 - named after how the run ended
    """The user stopped the run; committed products and checkpoints are kept."""


@dataclass
class StopRequest:
    """asked_at, hurried_at: monotonic seconds of the first and the second request. where: the progress of each job at
    the stop. running: whether a flow that checks this request is running. on_sigterm: what SIGTERM does meanwhile, if
    not what the orchestrator does then."""

    asked_at: float | None = None
    hurried_at: float | None = None
    where: list[str] = field(default_factory=list)
    running: bool = False
    on_sigterm: Callable[[int, FrameType | None], None] | None = None
    patience_seconds: float = ORDERLY_SECONDS
    """Between the first request and the moment at which a job that still runs is killed."""

    def ask(self) -> None:
        """Request a clean stop; a second call requests an immediate one."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()
        elif self.hurried_at is None:
            self.hurried_at = time.monotonic()

    @contextmanager
    def flow(self) -> Iterator[None]:
        """While a flow's own code runs; it may run other flows. The orchestrator's engine replaces the handler of
        SIGTERM when each of them begins."""
        outer, self.running = self.running, True
        before = None if self.on_sigterm is None else signal.signal(signal.SIGTERM, self.on_sigterm)
        try:
            yield
        finally:
            self.running = outer
            if before is not None and self.asked_at is None:  # a second signal must not disturb the stop
                signal.signal(signal.SIGTERM, before)

    def check(self) -> None:
        """Raises RunStopped if a stop was requested."""
        if self.asked_at is not None:
            raise RunStopped(self.describe())

    @property
    def patience_is_over(self) -> bool:
        """Whether a job that has been signalled is to be killed now."""
        late = self.asked_at is not None and time.monotonic() - self.asked_at >= self.patience_seconds
        return late or self.hurried_at is not None

    def describe(self) -> str:
        """ "stopped in align at 120 of 500 steps" """
        return f"stopped in {' and '.join(self.where)}" if self.where else "stopped between two stages"


REQUEST = StopRequest()


class Stopper:
    """Passes a stop request on to one job: one signal to stop, a second one to kill it."""

    def __init__(self, signal_job: Callable[[], None]) -> None:
        self._signal_job = signal_job
        self._signals = 0

    def look(self) -> None:
        """Called about once a second while the job runs; one signal at a time, since two at once may arrive as one."""
        needed = 2 if REQUEST.patience_is_over else 1 if REQUEST.asked_at is not None else 0
        if self._signals < needed:
            self._signals += 1
            self._signal_job()
