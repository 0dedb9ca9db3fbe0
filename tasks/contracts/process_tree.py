"""Finds the processes of a job in /proc and ends them. Standard library only.

Every process of a job inherits `RADLADS_JOB=<job>/<attempt>` in its environment, wherever its launcher moves it: out of
its process group, into another session, or, once its parent is dead, to init. A signal is sent to a process only after
its mark was read and through a descriptor of that same process, so that a reused pid is never signalled.
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
"""Name of the process that outlives a killed supervisor until it has killed the supervisor's job."""
_SUPERVISOR = b"radlads.tasks.launchers.supervise"
_TICK_SECONDS = 0.1
_KILL_SECONDS = 30.0


_GUARD = "import signal, sys; sys.stdin.buffer.read(); signal.pidfd_send_signal(int(sys.argv[1]), signal.SIGKILL)"


def end_with_me(pid: int) -> None:
    """Ensure that a child without a parent-death signal is killed when this process ends, for any reason.

    A small process waits for end of file on a pipe that only this process holds open, then kills the child through its
    descriptor.
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
    """A living process. started: clock ticks after boot, which distinguishes it from a later one with its pid."""

    pid: int
    parent: int
    started: int


def job_id(scratch: Path) -> str:
    """The name of the job with this scratch folder: the same for all its attempts, unique on this machine."""
    return hashlib.sha256(os.fsencode(scratch.resolve())).hexdigest()[:24]


def new_mark(job: str) -> str:
    """The mark of one attempt at a job."""
    return f"{job}/{uuid.uuid4().hex}"


def processes() -> list[Process]:
    """Every living process of this machine; zombies are left out."""
    found = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return [process for process in found if process is not None]


def read_process(pid: int) -> Process | None:
    """One living process, or None."""
    fields = read_proc(pid, "stat").rsplit(b")", 1)[-1].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid=pid, parent=int(fields[1]), started=int(fields[19]))


def read_proc(pid: int, name: str) -> bytes:
    """A file of /proc/<pid>; empty if the process has ended or belongs to another user."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def marked(mark: str) -> list[Process]:
    """This user's living processes of one attempt, or of every attempt where `mark` ends with a slash; never the
    calling process."""
    return [process for process in processes() if process.pid != os.getpid() and _carries(process.pid, mark)]


def kill_marked(mark: str, *, spare: Iterable[int] = ()) -> tuple[int, list[int]]:
    """Kill every process of `marked(mark)` except `spare`. Returns their number, and the pids of those that still exist
    after half a minute, for example because a driver blocks them."""
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
    """End the processes that earlier attempts at a job left behind; returns their number. seconds: time for a
    supervisor whose parent has died to stop its job cleanly; without a supervisor the processes are killed at once.
    Raises BlockingIOError, which names the process, if another living process runs the job or a process cannot be
    ended.
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
        raise BlockingIOError(f"process {left[0]}, left by an earlier attempt, does not end")
    return max(len(found), killed)


def _lives(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.started == process.started


def _kill(process: Process, mark: str) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        handle = os.pidfd_open(process.pid)
        try:
            # Checked again: now that it is open, its pid cannot be reused.
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
    expected = mark.encode()
    same = value.startswith(expected) if mark.endswith("/") else value == expected
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
