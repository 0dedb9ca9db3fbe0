"""Who holds something that only one process may: said in one line, and whether it is still alive."""

from __future__ import annotations

import os
import pwd
import socket
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from radlads.tasks.contracts.job import Sheet


class Holder(Sheet):
    """A process, as others see it. machine: the kernel's boot and the pid namespace, within which a pid means one
    process; started: when that process began, so that a later one of the same pid is not taken for it."""

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
        """Whether its process, dead or alive, is one of this machine."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether its process runs; only of one that is here can that be told."""
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
    """Who runs this process."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without a passwd entry
        return f"uid {os.getuid()}"


@cache
def _machine() -> str:
    """Empty where it cannot be told: then nobody is here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since boot; empty for one that is gone or only waits to be buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
