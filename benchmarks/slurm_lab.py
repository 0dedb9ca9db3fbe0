"""A Slurm cluster of two nodes on one machine, of Debian's own slurmctld, slurmd and munge. Tests and the drill use it.

Both nodes are this machine: they share its file system and loopback. It needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
AccountingStorageType=accounting_storage/none
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2 RealMemory=1000
PartitionName=main Nodes=node[1-2] Default=YES State=UP
"""
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "munged")
_UP_SECONDS = 30.0


def why_no_slurm() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    missing = [name for name in _PROGRAMS if _program(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run a cluster with its files in a folder; yields the environment in which Slurm's commands use it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = [_free_port() for _ in range(2)]
    first = ports[0]
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(host=socket.gethostname(), folder=folder, port=ports[1], first=first, second=first + 1)
    )
    environment = {"SLURM_CONF": str(conf)}
    with ExitStack() as stack:
        names = ("socket", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in names]
        commands = [
            ["munged", "--foreground", "--force", f"--key-file={key}", *files],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "node1"],
            ["slurmd", "-D", "-N", "node2"],
        ]
        for command in commands:
            program = _program(command[0])
            assert program is not None
            with (folder / "daemons.log").open("ab") as log:
                process = subprocess.Popen(
                    [program, *command[1:]],
                    env=os.environ | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            stack.callback(_end, process)
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        idle = ["sinfo", "--noheader", "--format=%D %t"]
        _wait(lambda: _answer(idle, environment).split() == ["2", "idle"], folder)
        yield environment
        subprocess.run(["scancel", "--user", "root"], env=os.environ | environment, capture_output=True, check=False)
        _wait(lambda: _answer(["squeue", "--noheader"], environment) == "", folder)


def _answer(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else "?"


def _wait(condition: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + _UP_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"the cluster does not come up; see {folder}/daemons.log")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    """A port with a free successor."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            with contextlib.suppress(OSError):
                two.bind(("127.0.0.1", port + 1))
                return port


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
