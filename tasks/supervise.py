"""Runs one command so that nothing of it outlives its purpose: `python -m radlads.tasks.supervise ... -- command`.

A process group is not enough: DeepSpeed's launcher and torchrun's workers leave it. This program adopts every orphan
below it (child subreaper), is told when the process that started it dies (parent-death signal), and finds what runs
below it by walking /proc. Told to stop, it asks the ranks first, so that they can save a checkpoint while their
launcher still waits for them; then everybody; then it kills. Standard library only: it starts in milliseconds.

Exit code: the command's; 128 + signal when it died by one or was stopped.
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
from pathlib import Path

_PR_SET_PDEATHSIG = 1
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
        return 128 + signal.SIGTERM  # the parent died before it could be watched
    with open(options.log, "ab") as log:
        child = subprocess.Popen(
            options.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
        )
    while child.poll() is None and not stops:
        if os.getppid() != options.parent:
            stops.append(signal.SIGTERM)
        time.sleep(_TICK_SECONDS)
    if stops:
        _ask_ranks(child, options.grace, lambda: len(stops) > 1)
    _end_everybody(child)
    if stops:
        return 128 + stops[0]
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="radlads.tasks.supervise")
    parser.add_argument("--parent", type=int, required=True, help="process id; its death stops the command")
    parser.add_argument("--grace", type=float, required=True, help="seconds between asking and killing")
    parser.add_argument("--log", required=True, help="file that the command's output is appended to")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def _ask_ranks(child: subprocess.Popen[bytes], grace: float, hurry: Callable[[], bool]) -> None:
    """SIGTERM to the ranks (or to the command itself, if it has none) and wait for the whole tree to end."""
    for pid in _ranks() or [child.pid]:
        _signal(pid, signal.SIGTERM)
    _wait(child, grace, lambda: hurry() or child.returncode is not None)


def _end_everybody(child: subprocess.Popen[bytes]) -> None:
    """No descendant is left when this returns."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _descendants():
            _signal(pid, number)
        _wait(child, _STRAGGLER_SECONDS)
    while _descendants():
        for pid in _descendants():
            _signal(pid, signal.SIGKILL)
        _wait(child, _TICK_SECONDS)
    child.wait()


def _wait(child: subprocess.Popen[bytes], seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
    end = time.monotonic() + seconds
    while True:
        child.poll()
        if child.returncode is not None:
            _reap()
        if not _descendants() or enough() or time.monotonic() >= end:
            return
        time.sleep(_TICK_SECONDS)


def _reap() -> None:
    """Bury adopted orphans. Only once the command itself is buried: its exit code must not get lost."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _descendants() -> list[int]:
    """Living processes below this one, parents before children."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue
            children.setdefault(int(parent), []).append((int(entry), state))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        for pid, state in children.get(waiting.pop(), []):
            waiting.append(pid)
            if state != "Z":
                found.append(pid)
    return found


def _ranks() -> list[int]:
    """Descendants that were started as a rank of a distributed job; not their helpers, which inherit the mark."""
    marked = [pid for pid in _descendants() if b"\0LOCAL_RANK=" in b"\0" + _read(f"/proc/{pid}/environ")]
    return [pid for pid in marked if _parent(pid) not in marked]


def _parent(pid: int) -> int:
    fields = _read(f"/proc/{pid}/stat").rsplit(b")", 1)[-1].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    """In the child before exec: even a supervisor killed with -9 takes the command along."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
