"""A run at work in this process, at a terminal: one table of its stages that is renewed, and the log lines above it."""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from radlads.flows.run_view import stage_table, summary
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.look.run_state import RunState, look
from radlads.tasks.observe import IS_PROGRESS

_LOOK_SECONDS = 2.0
_LOOK_REMOTE_SECONDS = 6.0
"""A look at a run in a bucket is dozens of requests."""
_CLOSE_SECONDS = 3.0
_OTHER_LINES = 5
"""Of the terminal: the heading, the header, the summary, and some of the log."""


class LiveTable:
    """A context manager around a run: at a terminal it shows where the run stands, twice a second, by what the store
    and the scratch folders say. Elsewhere, and where a terminal cannot move its cursor, it does nothing: there the
    log's lines tell. A fault of the store leaves the table as it was."""

    _shown: ClassVar[LiveTable | None] = None
    """The one on the terminal; a process shows one at a time."""

    def __init__(self, console: Console, store: Store, run: str) -> None:
        self._console, self._store, self._run = console, store, run
        self._state: RunState | None = None
        self._seen_at = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="radlads-live-table", daemon=True)
        self._live: Live | None = None
        self._logs = ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = self._started()
            self._logs.enter_context(_log_above())
            self._thread.start()
            LiveTable._shown = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is None:
            return
        LiveTable._shown = None
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)  # its last look, which a store that is away does not prolong
        self._logs.close()
        self._live.stop()

    def _started(self) -> Live:
        live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=2,
            redirect_stdout=sys.stdout.isatty(),
            vertical_overflow="crop",
        )
        live.start()
        return live

    @classmethod
    @contextmanager
    def hidden(cls) -> Iterator[None]:
        """Meanwhile the terminal is free for a question and its answer, which stay above the table."""
        shown = cls._shown
        if shown is None or shown._live is None:
            yield
            return
        shown._live.stop()
        try:
            yield
        finally:
            shown._live = shown._started()  # the same one would be drawn over what was written meanwhile

    def _look(self) -> None:
        seconds = _LOOK_SECONDS if isinstance(self._store, LocalStore) else _LOOK_REMOTE_SECONDS
        is_last = False
        while not is_last:
            is_last = self._closing.is_set()
            self._look_once()
            self._closing.wait(seconds)

    def _look_once(self) -> None:
        try:
            self._state = look(self._store, self._run, layout_checked=True)
            self._seen_at = time.monotonic()
        except (StoreError, UserError, OSError, ValueError):  # not begun, or the store is away: the run itself says so
            return

    def _render(self) -> RenderableType:
        if self._state is None:
            return Text(f"{self._run}: starting", style="dim")
        state = advanced(self._state, time.monotonic() - self._seen_at)
        shown = fitting(state, self._console.height - _OTHER_LINES)
        heading = Text.assemble((state.run, "bold"), " · ", state.recipe)
        return Group(Text(), heading, stage_table(shown, self._console.width), Text(summary(state), no_wrap=True))


def advanced(state: RunState, seconds: float) -> RunState:
    """The state some seconds after the look at it: the stages at work have taken that much longer."""
    stages = [
        replace(
            stage,
            seconds=(stage.seconds or 0.0) + seconds,
            seconds_left=None if stage.seconds_left is None else max(0.0, stage.seconds_left - seconds),
        )
        if stage.word in ("running", "starting")
        else stage
        for stage in state.stages
    ]
    return replace(state, stages=stages)


def fitting(state: RunState, lines: int) -> RunState:
    """The same with as many stages as there are lines for: first those that are done are left out, then the last ones
    to do."""
    stages = list(state.stages)
    for spare in (range(len(stages)), range(len(stages) - 1, -1, -1)):
        for index in spare:
            if len(stages) <= max(1, lines):
                break
            stage = state.stages[index]
            if stage.word == ("done" if spare.step > 0 else "to do") and stage in stages:
                stages.remove(stage)
    return replace(state, stages=stages)


@contextmanager
def _log_above() -> Iterator[None]:
    """While a live table is shown, Prefect's log lines are printed above it, without those that only repeat what the
    table shows. Prefect's handler keeps the stream that it was made with, so it gets the one that Live has put in its
    place, in a form that its console does not unwrap."""
    names = [None, *logging.Logger.manager.loggerDict]
    found = {handler for name in names for handler in logging.getLogger(name).handlers}
    handlers: list[Any] = [handler for handler in found if isinstance(getattr(handler, "console", None), Console)]
    before = [handler.console.file for handler in handlers]
    quiet = _NoProgress()
    for handler in handlers:
        handler.console.file = _Stderr()
        handler.addFilter(quiet)
    try:
        yield
    finally:
        for handler, file in zip(handlers, before, strict=True):
            handler.console.file = file
            handler.removeFilter(quiet)


class _Stderr(io.TextIOBase):
    """What is sys.stderr at each write."""

    def write(self, text: str) -> int:
        """As a stream's."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """As a stream's."""
        sys.stderr.flush()

    def isatty(self) -> bool:
        """As a stream's."""
        return sys.stderr.isatty()


class _NoProgress(logging.Filter):
    """Leaves out the lines of progress."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return not getattr(record, IS_PROGRESS, False)
