"""Two machines on one: network namespaces joined by a bridge, each with an sshd of its own. Tests and the drill use it.

The two share the file system and the process table, but no network: ranks meet over the bridge, as those of two
machines over a switch. It needs root, `ip` and `sshd`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_PORT = 2222
_SSHD = """
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
_CLIENT = """
Host {names}
  Port {port}
  User {user}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
  LogLevel ERROR
"""


def why_not() -> str | None:
    """Why there can be no lab here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "sshd", "ssh", "ssh-keygen") if _program(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"rl{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this machine allows no network namespaces"
    _ip("netns", "del", name)
    return None


@dataclass(frozen=True)
class Machine:
    """One of the two. name: of the namespace and for ssh."""

    name: str
    address: str

    def pids(self) -> list[int]:
        """Its processes."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def kill(self) -> None:
        """As if its power had failed, but that its kernel still closes connections."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def cut(self) -> None:
        """Cut its network: nothing arrives, nothing is closed."""
        _ip("link", "set", f"{self.name}x", "down")

    def join(self) -> None:
        """Undo `cut`."""
        _ip("link", "set", f"{self.name}x", "up")


@dataclass(frozen=True)
class Lab:
    """machines: the two. ssh_config: with which ssh reaches them by name, from here."""

    machines: tuple[Machine, Machine]
    ssh_config: Path
    folder: Path

    def start_sshd(self, machine: Machine) -> None:
        """Start a machine's sshd; also after `kill`."""
        _start_sshd(self.folder, machine)


@contextmanager
def two_machines(folder: Path) -> Iterator[Lab]:
    """A lab with its keys and configurations in a folder; nothing of it is left at the end of the block."""
    number = os.getpid() % 50_000
    bridge, net = f"rl{number}", f"198.18.{number % 250}"  # a range for tests of networks (RFC 2544)
    machines = tuple(Machine(f"r{letter}{number}", f"{net}.{last}") for letter, last in (("a", 2), ("b", 3)))
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for machine in machines:
            _ip("netns", "add", machine.name)
            stack.callback(_ip, "netns", "del", machine.name)
            stack.callback(machine.kill)
            _ip("link", "add", f"{machine.name}x", "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            _ip("link", "set", f"{machine.name}x", "master", bridge, "up")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            _ip("-n", machine.name, "link", "set", "eth0", "up")
            _ip("-n", machine.name, "link", "set", "lo", "up")
        folder.mkdir(parents=True, exist_ok=True)
        for key in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(folder / key)]
            subprocess.run(command, check=True)
        lab = Lab((machines[0], machines[1]), folder / "ssh_config", folder)
        client = _CLIENT.format(
            names=" ".join(one.name for one in machines), port=_PORT, user=getpass.getuser(), folder=folder
        )
        known = (folder / "host_key.pub").read_text()
        hosts = "".join(f"Host {one.name}\n  HostName {one.address}\n" for one in machines)
        lab.ssh_config.write_text(client + hosts)
        (folder / "known_hosts").write_text("".join(f"[{one.address}]:{_PORT} {known}" for one in machines))
        for machine in machines:
            lab.start_sshd(machine)
        yield lab


def _start_sshd(folder: Path, machine: Machine) -> None:
    config = folder / f"sshd-{machine.name}"
    config.write_text(_SSHD.format(port=_PORT, address=machine.address, folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)  # sshd's own, which a package's service would make
    program = _program("sshd")
    assert program is not None
    command = ["ip", "netns", "exec", machine.name, program, "-D", "-e", "-f", str(config)]
    with (folder / f"sshd-{machine.name}.log").open("ab") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((machine.address, _PORT), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
