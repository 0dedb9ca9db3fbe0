"""Runs one command and ends all of its processes: `python -m radlads.tasks.launchers.supervise ... -- command`.

A process group is not enough: DeepSpeed's launcher and torchrun's workers leave it. This program adopts every orphan
below it (child subreaper), gets a signal when the process that started it dies (parent-death signal), and finds its
descendants by walking /proc. On a stop request it sends SIGTERM to the ranks first, so that they can save a checkpoint
while their launcher still waits for them; then to all descendants; then it kills them. A warden covers the case that
the supervisor itself is killed with -9: a fork in a session of its own that waits for the supervisor's end and kills
every process with the attempt's mark (process_tree.py). Standard library only: it starts in milliseconds.

Exit code: the command's; 128 + signal if it died by one or was stopped; 127 if it could not be started, with the reason
in the log.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from radlads.tasks.contracts.process_tree import MARK, WARDEN, kill_marked, new_mark, processes, read_proc, read_process

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_TICK_SECONDS = 0.1
_STRAGGLER_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, clean up, and return its exit code."""
    options = _parse(arguments)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: stops.append(received))
    if os.getppid() != options.parent:
        return 128 + signal.SIGTERM  # the parent died before its death signal was set
    warden = _Warden(os.environ.setdefault(MARK, new_mark("job")))
    try:
        return _run(options, stops, warden)
    finally:
        warden.dismiss()


def _run(options: argparse.Namespace, stops: list[int], warden: _Warden) -> int:
    with open(options.log, "ab") as log:
        try:
            child = subprocess.Popen(
                options.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        except OSError as error:
            log.write(f"cannot start {options.command[0]}: {error.strerror}\n".encode())
            return 127
    while child.poll() is None and not stops:
        if os.getppid() != options.parent:
            stops.append(signal.SIGTERM)
        time.sleep(_TICK_SECONDS)
    if stops:
        _ask_ranks(child, options.grace, lambda: len(stops) > 1, warden.pid)
    _end_everybody(child, warden.pid)
    if stops:
        return 128 + stops[0]
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="radlads.tasks.launchers.supervise")
    parser.add_argument("--parent", type=int, required=True, help="process id; its death stops the command")
    parser.add_argument("--grace", type=float, required=True, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--log", required=True, help="file that the command's output is appended to")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


class _Warden:
    """A fork that outlives a killed supervisor until it has killed every process with `mark`."""

    def __init__(self, mark: str) -> None:
        supervisor = os.getpid()
        reading, self._writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writing)
            os.setsid()
            _prctl(_PR_SET_NAME, ctypes.c_char_p(WARDEN.encode()))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            if not os.read(reading, 1):  # end of file: the supervisor died without a message
                kill_marked(mark, spare=[supervisor])
            os._exit(0)
        os.close(reading)

    def dismiss(self) -> None:
        """Dismiss the warden after a normal end: it kills nothing."""
        with contextlib.suppress(BrokenPipeError, ChildProcessError):
            os.write(self._writing, b".")
            os.waitpid(self.pid, 0)


def _ask_ranks(child: subprocess.Popen[bytes], grace: float, hurry: Callable[[], bool], warden: int) -> None:
    """SIGTERM to the ranks (or to the command itself, if it has none) and wait for the whole tree to end."""
    for pid in _ranks() or [child.pid]:
        _signal(pid, signal.SIGTERM)
    _wait(child, grace, warden, lambda: hurry() or child.returncode is not None)


def _end_everybody(child: subprocess.Popen[bytes], warden: int) -> None:
    """Kill all descendants except the warden; none remains when this returns."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _descendants(warden):
            _signal(pid, number)
        _wait(child, _STRAGGLER_SECONDS, warden)
    while _descendants(warden):
        for pid in _descendants(warden):
            _signal(pid, signal.SIGKILL)
        _wait(child, _TICK_SECONDS, warden)
    child.wait()


def _wait(
    child: subprocess.Popen[bytes], seconds: float, warden: int, enough: Callable[[], bool] = lambda: False
) -> None:
    end = time.monotonic() + seconds
    while True:
        child.poll()
        if child.returncode is not None:
            _reap()
        if not _descendants(warden) or enough() or time.monotonic() >= end:
            return
        time.sleep(_TICK_SECONDS)


def _reap() -> None:
    """Reap adopted orphans. Only after the command itself was reaped, so that its exit code is not lost."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants(but: int = 0) -> list[int]:
    """Living processes below this one, parents before children, without `but`."""
    children: dict[int, list[int]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process.pid)
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = [pid for pid in children.get(waiting.pop(), []) if pid != but]
        waiting += below
        found += below
    return found


def _ranks() -> list[int]:
    """Descendants started as ranks of a distributed job; not their child processes, which inherit the mark."""
    marked = [pid for pid in _descendants() if b"\0LOCAL_RANK=" in b"\0" + read_proc(pid, "environ")]
    return [pid for pid in marked if _parent(pid) not in marked]


def _parent(pid: int) -> int:
    process = read_process(pid)
    return process.parent if process is not None else 0


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prctl(option: int, value: object) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    """Runs in the child before exec: the command dies with the supervisor, even if that is killed with -9."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
