"""What Prefect's pages show of a run: progress, tables, pictures, links. Their failure never fails a run."""

from __future__ import annotations

import base64
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.concurrency.sync import concurrency
from prefect.exceptions import PrefectException

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.launchers.launcher import Launcher
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.plan_table import short_duration

_log = logging.getLogger("prefect.radlads")
IS_PROGRESS = "is_progress"
"""Attribute of the log records that say how far a stage is, for whoever shows that in another way."""
_UPDATE_SECONDS = 2.0
_LOG_SECONDS = 60.0


class ProgressView:
    """A progress bar in Prefect's page, and a line in the run's log: at most one a minute, and at the end; a line and a
    table of every event. clock: seconds."""

    def __init__(self, run: str, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key, self._run, self._label = artifact_key(run, label, "progress"), run, label
        self._artifact: UUID | None = None
        self._shown_at = self._logged_at = -math.inf
        self._began: tuple[float, float] | None = None
        self._events: tuple[str, ...] = ()

    def show(self, progress: Progress) -> None:
        """Called about once a second by the launcher."""
        self._show_events(progress.events)
        share = min(1.0, progress.done / progress.total) if progress.total else 0.0
        now = self._clock()
        if self._began is None:
            self._began = (now, progress.done)
        if now - self._shown_at < _UPDATE_SECONDS and share < 1.0:
            return
        self._shown_at = now
        text = describe(progress, self._left(progress, now))
        if now - self._logged_at >= _LOG_SECONDS or share >= 1.0:
            self._logged_at = now
            _log.info("%s: %s", self._label, text, extra={IS_PROGRESS: True})
        with _best_effort():
            if self._artifact is None:
                made = create_progress_artifact(progress=100 * share, key=self._key, description=text)
                self._artifact = UUID(str(made))
            else:
                update_progress_artifact(artifact_id=self._artifact, progress=100 * share, description=text)

    def _left(self, progress: Progress, now: float) -> float | None:
        """Seconds to go, at the pace since this process began to look; None before there is one."""
        began, done = self._began or (now, progress.done)
        pace = (progress.done - done) / (now - began) if now > began else 0.0
        return (progress.total - progress.done) / pace if pace > 0 and progress.done < progress.total else None

    def _show_events(self, events: tuple[str, ...]) -> None:
        if events == self._events:
            return
        for event in events[len(self._events) :]:
            _log.warning("%s: %s", self._label, event)
        self._events = events
        rows = [{"event": event} for event in events]
        show_table(self._run, f"{self._label}-events", rows, f"What the watch of {self._label} noticed: {self._run}")


def describe(progress: Progress, left_seconds: float | None = None) -> str:
    """ "120 of 500 steps · loss 1.234 · 9,000 tokens/s · 12 min to go" """
    parts = [f"{progress.done:,.0f} of {progress.total:,.0f} {progress.unit}"]
    loss, pace = progress.metrics.get("loss"), progress.metrics.get("tokens_per_second")
    parts += [] if loss is None else [f"loss {loss:.4g}"]
    parts += [] if pace is None else [f"{pace:,.0f} tokens/s"]
    parts += [] if left_seconds is None else [f"{short_duration(left_seconds)} to go"]
    return " · ".join(parts)


def show_table(run: str, label: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table in Prefect's page."""
    with _best_effort():
        create_table_artifact(table=[dict(row) for row in rows], key=artifact_key(run, label), description=description)


def show_markdown(run: str, label: str, text: str, description: str) -> None:
    """A page of text in Prefect's page."""
    with _best_effort():
        create_markdown_artifact(markdown=text, key=artifact_key(run, label), description=description)


def show_picture(run: str, label: str, png: bytes, description: str) -> None:
    """A picture in Prefect's page; the link contains its data, so that no server has to provide it."""
    with _best_effort():
        link = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        create_image_artifact(image_url=link, key=artifact_key(run, label), description=description)


def show_link(run: str, label: str, url: str | None, text: str) -> None:
    """A link in Prefect's page; nothing without an address."""
    if url is not None:
        with _best_effort():
            create_link_artifact(link=url, link_text=text, key=artifact_key(run, label), description=text)


@contextmanager
def gpu_slot(limit: str, launcher: Launcher, resources: JobResources, purpose: str) -> Iterator[None]:
    """Wait for exclusive use of the GPUs that a job computes on; does nothing for a job on the CPU.

    Prefect's limit covers all runs of a server. It is leased, so it is released when its holder dies; a limit that was
    not created has no effect. The launcher's own lock works with and without a server.
    """
    if resources.device == "cpu":
        yield
        return
    with concurrency(limit, occupy=1, strict=False), launcher.hold_devices(resources, purpose):
        yield


def artifact_key(*parts: str) -> str:
    """A key that Prefect accepts: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


@contextmanager
def _best_effort() -> Iterator[None]:
    try:
        yield
    except (PrefectException, httpx.HTTPError, OSError, ValueError) as error:
        _log.warning("Prefect did not accept an artifact: %s", error)
