"""progress.json: how far a job is, and what its watch noticed; tasks/launchers/progress.py reads it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from radlads.tasks.jobs.exit_reasons import write_json

logger = logging.getLogger("radlads")

_SECONDS = 1.0


class ProgressFile:
    """Written by the first rank, at most about once a second, at the end, and without delay after an event."""

    def __init__(self, scratch: Path, rank: int) -> None:
        self._path, self._rank = scratch / "progress.json", rank
        self._written_at = 0.0
        self._events: list[str] = []

    def write(self, done: float, total: float, unit: str) -> None:
        """Report the progress."""
        now = time.monotonic()
        if self._rank == 0 and (done >= total or now - self._written_at >= _SECONDS):
            self._written_at = now
            events = {"events": self._events} if self._events else {}
            write_json(self._path, {"done": done, "total": total, "unit": unit, **events})

    def announce(self, event: str, *, new: bool = True) -> None:
        """Add an event, one line, to the next report; a new one is logged, too."""
        self._events.append(event)
        if new and self._rank == 0:
            logger.warning("%s", event)
            self._written_at = 0.0
