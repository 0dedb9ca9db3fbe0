"""A run in this process, for a user at a terminal: Ctrl-C stops it cleanly, and its end is reported once.

After the first Ctrl-C the jobs save a checkpoint and stop; the second one stops them at once. SIGTERM, which `timeout`,
batch systems and service managers send, often to all processes of the run and twice, is as the first Ctrl-C. In any
case the process exits within twenty seconds, even if something hangs.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from types import FrameType, SimpleNamespace
from typing import Any

from rich.console import Console

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.process_tree import end_with_me
from radlads.tasks.launchers.launcher import JobFailed
from radlads.tasks.launchers.stopping import REQUEST

EXIT_INTERRUPTED = 128 + signal.SIGINT
_LONGEST_SECONDS = 18.0
_LONGEST_HURRY_SECONDS = 8.0
_LOOK_SECONDS = 0.1


def command_line(command: str, *arguments: str, options: Sequence[tuple[str, str | None]]) -> str:
    """The command to type again, quoted for a shell. options: name → value; one without a value is left out."""
    words = ["radlads", command, *arguments]
    for name, value in options:
        if value is not None:
            words += [name, value]
    return shlex.join(words)


def run_in_foreground(
    flow: Callable[..., Any],
    parameters: dict[str, Any],
    again: str,
    err: Console,
    shown: AbstractContextManager[object] | None = None,
) -> dict[str, str]:
    """Run a flow to its end; stage → uri of its product. again: the command that continues this run. shown: what is
    shown while it runs.
    Raises UserError or RunFailed with the explanation and the remedy; ends the process with 130 after Ctrl-C, and with
    143 after SIGTERM.
    """
    state = end_in_foreground(flow, parameters, again, err, shown)
    if not state.is_completed():
        raise failure_of(state, again)
    made: dict[str, str] = state.result()
    return made


def end_in_foreground(
    flow: Callable[..., Any],
    parameters: dict[str, Any],
    again: str,
    err: Console,
    shown: AbstractContextManager[object] | None = None,
) -> Any:
    """As run_in_foreground; the flow's final state, whatever it is."""
    from radlads.flows.approval import asked_at_terminal
    from radlads.flows.common import ENDINGS

    ending = _Ending(again, err)
    with _interruptible(ending), asked_at_terminal(err):
        try:
            _start_temporary_server()
            ENDINGS.by_caller = True
            with shown or nullcontext():
                state = flow(**parameters, return_state=True)
        except KeyboardInterrupt:  # no part of the run was running
            REQUEST.ask()
            state = None
        finally:
            ENDINGS.by_caller = False
        if REQUEST.asked_at is not None and (state is None or not state.is_completed()):
            ending.stopped(begun=state is not None)
            raise SystemExit(ending.code)
    return state


class RunFailed(Exception):  # noqa: N818 - a final state, named as those of jobs are
    """A run ended while it was at work, by a crash or a fault of the store; the message has a line with the command
    that continues it."""


def failure_of(state: Any, again: str) -> UserError | RunFailed:
    """Why a flow did not complete, and the command that continues it; a UserError where something has to be changed
    first."""
    error = state.result(raise_on_failure=False)
    kind = UserError if isinstance(error, UserError) else RunFailed
    return kind("\n".join([state.message or str(error), *_advice(error, again)]))


def _advice(error: Any, again: str) -> list[str]:
    """The command that continues the run; none if the same request would be refused again."""
    if isinstance(error, JobFailed):
        return [f"once that is fixed, to continue where it stopped: {again}"]
    return [] if isinstance(error, UserError) else [f"to continue where it stopped: {again}"]


class _Ending:
    """Reports how an interrupted run ended: once, by whichever thread comes first."""

    def __init__(self, again: str, err: Console) -> None:
        self._again, self._err = again, err
        self._lock = threading.Lock()
        self._said = False
        self.code = EXIT_INTERRUPTED
        """Of the process: 128 and the signal that stopped it."""

    def stopped(self, *, begun: bool) -> None:
        """One line: where it stopped, and, if the run had begun, the command that continues it."""
        with self._lock:
            if not self._said:
                text = f"{REQUEST.describe()}; to continue: {self._again}" if begun else "stopped before the run began"
                self.say(text)
            self._said = True

    def say(self, text: str) -> None:
        """A line on stderr."""
        self._err.print(hide(text), markup=False, highlight=False, soft_wrap=True)

    def leave_terminal(self) -> None:
        """Give the terminal back as it was: what hides its cursor has no time left to show it again."""
        self._err.show_cursor(True)

    def waiting(self) -> None:
        """Explain the delay to a user at a terminal."""
        if self._err.is_terminal:
            self.say("stopping as soon as the job has saved a checkpoint; Ctrl-C again: at once")


@contextmanager
def _interruptible(ending: _Ending) -> Iterator[None]:
    """While the flow runs, Ctrl-C and SIGTERM become a stop request for its jobs; otherwise a KeyboardInterrupt. A
    signal that this process was started to ignore stays ignored."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        is_first = REQUEST.asked_at is None
        if number == signal.SIGTERM and not is_first:
            return
        ending.code = 128 + number if is_first else ending.code
        if not REQUEST.running:
            raise KeyboardInterrupt
        if is_first:
            threading.Thread(target=_end_in_time, args=[ending], name="radlads-deadline", daemon=True).start()
        REQUEST.ask()

    before = {number: signal.signal(number, on_signal) for number in numbers}
    REQUEST.on_sigterm = on_signal if signal.SIGTERM in before else None
    try:
        yield
    finally:
        REQUEST.on_sigterm = None
        for number, handler in before.items():
            signal.signal(number, handler)


class _Quiet(logging.Filter):
    """Hides Prefect's log records about a stop that the user requested."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return False


def _end_in_time(ending: _Ending) -> None:
    """Ends the process if a clean stop takes too long. The supervisors of its jobs notice that and end the jobs."""
    while REQUEST.asked_at is None:
        time.sleep(_LOOK_SECONDS)
    for handler in logging.getLogger("prefect").handlers:
        handler.addFilter(_Quiet())
    ending.waiting()
    while True:
        ends = [REQUEST.asked_at + _LONGEST_SECONDS]
        if REQUEST.hurried_at is not None:
            ends.append(REQUEST.hurried_at + _LONGEST_HURRY_SECONDS)
        if time.monotonic() >= min(ends):
            break
        time.sleep(_LOOK_SECONDS)
    ending.stopped(begun=True)
    ending.leave_terminal()
    _kill_temporary_server()
    os._exit(ending.code)


def _start_temporary_server() -> None:
    """If no Prefect server is configured, start the temporary one now, in a session of its own.

    A terminal sends Ctrl-C to every process of the run, a batch system SIGTERM. The server would stop first, and each
    request to it would be retried for minutes. Prefect has no setting for that, so its module gets another Popen.
    """
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    failed: list[Exception] = []

    def start() -> None:
        from prefect.server.api import server

        apart = functools.partial(subprocess.Popen, start_new_session=True)
        setattr(server, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": apart}))  # noqa: B010
        try:
            server.SubprocessASGIServer().start()
        except (RuntimeError, OSError) as error:
            failed.append(error)

    # The settings in force, the server's password among them, are those of the Prefect context.
    thread = threading.Thread(target=copy_context().run, args=[start], name="radlads-prefect-server", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_SECONDS)
    if failed:
        raise UserError(f"Prefect's temporary server did not start: {failed[0]}; try `radlads services up`")
    for pid in _temporary_servers():
        end_with_me(pid)


def _temporary_servers() -> list[int]:
    from prefect.server.api.server import SubprocessASGIServer

    started = [server.server_process for server in SubprocessASGIServer._instances.values()]
    return [process.pid for process in started if process is not None and process.poll() is None]


def _kill_temporary_server() -> None:
    for pid in _temporary_servers():
        os.kill(pid, signal.SIGKILL)
