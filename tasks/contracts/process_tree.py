"""Which processes belong to a job, found in /proc, and ended. Standard library only.

Every process of a job inherits `RADLADS_JOB=<job>/<attempt>` in its environment, wherever its launcher moves it: out of
its process group, into another session, or, once its parent is dead, to init. A signal goes to a process only after its
mark was read through a descriptor of that very process, so that a process number that was given away is never hit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MARK = "RADLADS_JOB"
WARDEN = "radlads-warden"
"""The name of the process that survives a supervisor for as long as it takes to kill what that one ran."""
_SUPERVISOR = b"radlads.tasks.launchers.supervise"
_TICK_SECONDS = 0.1
_KILL_SECONDS = 30.0


_GUARD = "import signal, sys; sys.stdin.buffer.read(); signal.pidfd_send_signal(int(sys.argv[1]), signal.SIGKILL)"


def end_with_me(pid: int) -> None:
    """Have a child that sets no parent-death signal of its own killed when this process ends, in whatever way.

    A small process waits for the end of a pipe that only this one holds open, and kills by a descriptor of the child.
    """
    descriptor = os.pidfd_open(pid)
    reading, _held_until_the_end = os.pipe()
    try:
        subprocess.Popen(
            [sys.executable, "-I", "-c", _GUARD, str(descriptor)],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[descriptor],
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
        os.close(reading)


@dataclass(frozen=True)
class Process:
    """A living process. started: clock ticks after boot, which tells it from another one that got its number."""

    pid: int
    parent: int
    started: int


def job_id(scratch: Path) -> str:
    """The name of the job that works in a folder: the same for each of its attempts, and for nothing else here."""
    return hashlib.sha256(os.fsencode(scratch.resolve())).hexdigest()[:24]


def new_mark(job: str) -> str:
    """The mark of one attempt at a job."""
    return f"{job}/{uuid.uuid4().hex}"


def processes() -> list[Process]:
    """Every living process of this machine; zombies are dead."""
    found = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return [process for process in found if process is not None]


def read_process(pid: int) -> Process | None:
    """One living process, or None."""
    fields = read_proc(pid, "stat").rsplit(b")", 1)[-1].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid=pid, parent=int(fields[1]), started=int(fields[19]))


def read_proc(pid: int, name: str) -> bytes:
    """A file of /proc/<pid>; empty where the process is gone or somebody else's."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def marked(mark: str) -> list[Process]:
    """This user's living processes of one attempt, or of every attempt where `mark` ends with a slash; never the
    calling process."""
    return [process for process in processes() if process.pid != os.getpid() and _carries(process.pid, mark)]


def kill_marked(mark: str, *, spare: Iterable[int] = ()) -> tuple[int, list[int]]:
    """Kill every process of `marked(mark)` but `spare`. Returns how many that were, and the numbers of those that were
    not gone after half a minute, as when a driver holds them."""
    kept = set(spare)
    killed: set[int] = set()
    end = time.monotonic() + _KILL_SECONDS
    while found := [process for process in marked(mark) if process.pid not in kept]:
        if time.monotonic() >= end:
            return len(killed), [process.pid for process in found]
        for process in found:
            _kill(process, mark)
        killed.update(process.pid for process in found)
        time.sleep(_TICK_SECONDS)
    return len(killed), []


def end_leftovers(job: str, *, seconds: float) -> int:
    """End what former attempts at a job left behind; how many processes that were.

    seconds: what a supervisor whose parent has died gets to stop its job in order; without one, they are killed at
    once. Raises BlockingIOError, whose text says who it is, where another living process runs the job or one that it
    left cannot be ended.
    """
    mark = f"{job}/"
    found = marked(mark)
    supervisors = [process for process in found if _is_supervisor(process.pid)]
    for process in supervisors:
        if _attended(process):
            raise BlockingIOError(f"process {process.parent} runs it")
    end = time.monotonic() + seconds
    while any(_lives(process) for process in supervisors) and time.monotonic() < end:
        time.sleep(_TICK_SECONDS)
    killed, left = kill_marked(mark)
    if left:
        raise BlockingIOError(f"process {left[0]}, left by a former attempt, does not end")
    return max(len(found), killed)


def _lives(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.started == process.started


def _kill(process: Process, mark: str) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        handle = os.pidfd_open(process.pid)
        try:
            # Asked again: from here on nobody else can get its number.
            if _lives(process) and _carries(process.pid, mark):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _carries(pid: int, mark: str) -> bool:
    value = b""
    for entry in read_proc(pid, "environ").split(b"\0"):
        name, _, text = entry.partition(b"=")
        if name == MARK.encode():
            value = text
    wanted = mark.encode()
    same = value.startswith(wanted) if mark.endswith("/") else value == wanted
    return same and _owner(pid) == os.getuid()


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def _is_supervisor(pid: int) -> bool:
    is_warden = read_proc(pid, "comm").strip() == WARDEN.encode()
    return not is_warden and _SUPERVISOR in read_proc(pid, "cmdline").split(b"\0")


def _attended(process: Process) -> bool:
    """Whether the process that started a supervisor still lives."""
    arguments = read_proc(process.pid, "cmdline").split(b"\0")
    with contextlib.suppress(ValueError, IndexError):
        return int(arguments[arguments.index(b"--parent") + 1]) == process.parent
    return False
