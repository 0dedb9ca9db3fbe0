"""job/progress.json of a product in the store: how far its job is, for whoever cannot see the job's machine.

The process that follows a job writes it, and the job's log, at a bounded rate from a thread of its own: a store that is
slow or away neither delays nor ends a job. It is for display alone; nothing depends on it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import Field, ValidationError

from radlads.tasks.contracts.errors import first_line
from radlads.tasks.contracts.job import JobSpec, Sheet
from radlads.tasks.contracts.locks.lease import Lease
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.launchers.local import has_ranks
from radlads.tasks.launchers.progress import Progress

_log = logging.getLogger(__name__)
PUBLISH_SECONDS = 15.0
"""Between two notes; a note that says something for the first time is not delayed."""
_WINDOW_SECONDS = 600.0
_CLOSE_SECONDS = 3.0
_LOG_STEP = 1 << 20
_LOG_MOST = 16 << 20
_NOTE_BYTES = 1 << 20
_MOST_EVENTS = 50


class ProgressNote(Sheet):
    """The state of a product's job. token: of the lease under which it was written; a note with another token is of an
    earlier attempt. done, total: None before the job has said how far it is."""

    token: int
    run: str
    began: datetime
    """Of this attempt, by the clock of the machine that follows the job."""
    seconds: float = 0.0
    """That the job has run, over all attempts."""
    done: float | None = None
    total: float | None = None
    unit: str = ""
    rate: float | None = None
    """Units a second, over the last ten minutes."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """The last row of the record."""
    events: tuple[str, ...] = ()
    device: str = "cpu"
    processes: int = 1
    dollars_per_gpu_hour: float | None = None

    @property
    def gpu_hours(self) -> float:
        """Hours of GPUs that its job has held; 0 for a job on the CPU."""
        return self.seconds * self.processes / 3600 if self.device == "cuda" else 0.0

    @property
    def dollars(self) -> float | None:
        """What these cost; None without a price."""
        return None if self.dollars_per_gpu_hour is None else self.gpu_hours * self.dollars_per_gpu_hour

    @property
    def seconds_left(self) -> float | None:
        """Until the job has done all; None where that is not known."""
        if self.done is None or self.total is None or not self.rate:
            return None
        return max(0.0, self.total - self.done) / self.rate


def note_key(product: str) -> str:
    """The key of a product's note."""
    return f"{product}/job/progress.json"


def log_key(product: str) -> str:
    """The key of the log of a product's job."""
    return f"{product}/job/log.txt"


def read_note(store: Store, product: str) -> ProgressNote | None:
    """The note of a product; None if there is none of this version. Raises StoreError."""
    found = store.read(note_key(product), limit=_NOTE_BYTES)
    try:
        return None if found is None else ProgressNote.model_validate_json(found[0])
    except ValidationError:
        return None


class Publisher:
    """A context manager around a job that writes the note and the log. lease: on the product; nothing is written after
    it was lost. resources: of the job."""

    def __init__(self, store: Store, product: str, spec: JobSpec, lease: Lease) -> None:
        self._store, self._product, self._lease = store, product, lease
        self._scratch, self._resources, self._run = Path(spec.scratch), spec.resources, spec.run
        self._device = spec.resources.device if stage_info(spec.stage).uses_device or has_ranks(spec) else "cpu"
        self._began, self._began_at = datetime.now(UTC), time.monotonic()
        self._earlier: float | None = None
        self._progress: Progress | None = None
        self._seen: deque[tuple[float, float]] = deque()
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._faults = 0
        self._log_size, self._log_due = 0, 0.0
        self._thread = threading.Thread(target=self._work, name=f"progress of {spec.stage}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)

    def see(self, progress: Progress) -> None:
        """What the launcher has read; returns at once."""
        now = time.monotonic()
        with self._lock:
            is_first = self._progress is None
            self._progress = progress
            if self._seen and progress.done < self._seen[-1][1]:  # a rollback
                self._seen.clear()
            if not self._seen or progress.done > self._seen[-1][1]:
                self._seen.append((now, progress.done))
            while now - self._seen[0][0] > _WINDOW_SECONDS and len(self._seen) > 2:
                self._seen.popleft()
        if is_first:
            self._wake.set()

    def _work(self) -> None:
        while True:
            closing = self._closing.is_set()
            if not self._lease.is_lost:
                self._publish(closing)
            if closing:
                return
            self._wake.wait(PUBLISH_SECONDS)
            self._wake.clear()

    def _publish(self, closing: bool) -> None:
        try:
            if self._earlier is None:
                former = read_note(self._store, self._product)
                self._earlier = 0.0 if former is None else former.seconds
            note = self._note(self._earlier)
            self._store.put_bytes(note_key(self._product), note.model_dump_json(indent=1).encode() + b"\n")
            if not closing:  # the whole record follows
                self._publish_log()
            self._faults = 0
        except Exception as fault:  # noqa: BLE001 - a display must not fail the job
            self._faults += 1
            if self._faults == 2:  # one alone may be a commit that cleans up beside it
                _log.warning("the progress in the store is not renewed: %s", first_line(fault))

    def _note(self, earlier: float) -> ProgressNote:
        with self._lock:
            progress, seen = self._progress, list(self._seen)
        rate = None
        if len(seen) > 1 and seen[-1][0] - seen[0][0] >= 1.0:
            rate = (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
        return ProgressNote(
            token=self._lease.ref.token,
            run=self._run,
            began=self._began,
            seconds=earlier + time.monotonic() - self._began_at,
            done=None if progress is None else progress.done,
            total=None if progress is None else progress.total,
            unit="" if progress is None else progress.unit,
            rate=rate,
            metrics={} if progress is None else _finite(progress.metrics),
            events=() if progress is None else progress.events[-_MOST_EVENTS:],
            device=self._device,
            processes=self._resources.processes,
            dollars_per_gpu_hour=self._resources.dollars_per_gpu_hour,
        )

    def _publish_log(self) -> None:
        """Write the log so far; the longer it is, the more rarely."""
        path, now = self._scratch / "log.txt", time.monotonic()
        size = path.stat().st_size if path.is_file() else 0
        if size == self._log_size or now < self._log_due or size > _LOG_MOST:
            return
        self._store.put_bytes(log_key(self._product), path.read_bytes())
        self._log_size, self._log_due = size, now + PUBLISH_SECONDS * (size // _LOG_STEP)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
