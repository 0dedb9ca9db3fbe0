"""The holder of a lock: a description in one line, and whether its process is still alive."""

from __future__ import annotations

import os
import pwd
import socket
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from radlads.tasks.contracts.job import Sheet


class Holder(Sheet):
    """A process, identified for other processes. machine: boot id and pid namespace, within which a pid is unique;
    started: start time, which distinguishes the process from a later one with the same pid."""

    user: str
    host: str
    pid: int
    machine: str
    started: str
    since: str
    work: str

    def __str__(self) -> str:
        return f"{self.user}@{self.host} (pid {self.pid}) since {self.since}, in {self.work}"

    @property
    def is_here(self) -> bool:
        """Whether its process, dead or alive, belongs to this machine."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether its process runs; known only for a process of this machine."""
        return _started(self.pid) == self.started


def this_process(work: Path) -> Holder:
    """This process. work: the folder that it works in."""
    return Holder(
        user=user_name(),
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started=_started(os.getpid()),
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        work=str(work),
    )


def user_name() -> str:
    """The user that runs this process."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without a passwd entry
        return f"uid {os.getuid()}"


@cache
def _machine() -> str:
    """Empty if unknown; then no process counts as one of this machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start time of a process, in ticks since boot; empty for one that has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
