"""A person's wish to stop the run of this process, as every job of it sees it. Knows no orchestrator.

A signal handler sets it, so there are no locks in here: plain attributes, each written by one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

ORDERLY_SECONDS = 12.0
"""What a job gets to save a checkpoint once a person has asked; whoever waits at a terminal does not wait longer."""


class RunStopped(Exception):  # noqa: N818 - named after how the run ended
    """The run was stopped by a person; what is committed or checkpointed stays."""


@dataclass
class StopRequest:
    """asked_at, hurried_at: monotonic seconds of the first and the second request. where: what each job was at.
    running: whether a flow is at work that looks at this."""

    asked_at: float | None = None
    hurried_at: float | None = None
    where: list[str] = field(default_factory=list)
    running: bool = False

    def ask(self) -> None:
        """Stop in order; asked again, at once."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()
        elif self.hurried_at is None:
            self.hurried_at = time.monotonic()

    def check(self) -> None:
        """Raises RunStopped when a stop was asked for."""
        if self.asked_at is not None:
            raise RunStopped(self.describe())

    @property
    def patience_is_over(self) -> bool:
        """Whether a job that was asked to stop is to be killed now."""
        late = self.asked_at is not None and time.monotonic() - self.asked_at >= ORDERLY_SECONDS
        return late or self.hurried_at is not None

    def describe(self) -> str:
        """ "stopped in align at 120 of 500 steps" """
        return f"stopped in {' and '.join(self.where)}" if self.where else "stopped between two stages"


REQUEST = StopRequest()


class Stopper:
    """Passes a request on to one job: asks once, and once more when it is to be killed."""

    def __init__(self, signal_job: Callable[[], None]) -> None:
        self._signal_job = signal_job
        self._signals = 0

    def look(self) -> None:
        """Called about once a second while the job runs; one signal at a time, since two at once may arrive as one."""
        wanted = 2 if REQUEST.patience_is_over else 1 if REQUEST.asked_at is not None else 0
        if self._signals < wanted:
            self._signals += 1
            self._signal_job()
