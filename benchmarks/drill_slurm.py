"""Cases of the drill on a Slurm cluster of two nodes: cancelled, requeued and killed jobs, and a flow that dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from drill_case import STEPS, Place, wait
from drill_hosts import at_step, set_resources

_GONE_SECONDS = 40.0
Cluster = dict[str, str]
"""The environment in which Slurm's commands use it."""


def on_slurm(place: Place, cluster: Cluster) -> None:
    """Have a case's flow run its jobs as batch jobs of two nodes."""
    place.extra = cluster
    set_resources(place, {"launcher": "slurm", "device": "cpu", "threads": 1, "slurm": {"nodes": 2}})


def cancelled(place: Place, cluster: Cluster) -> str:
    """scancel by somebody else."""
    flow = at_step(place, STEPS // 2)
    _slurm(cluster, "scancel", _job(cluster))
    return _ended(place, cluster, flow, 2, r"Slurm job \d+ was cancelled")


def requeued(place: Place, cluster: Cluster) -> str:
    """A requeue, as at a preemption: the same job goes on from its checkpoint, and the flow with it."""
    flow = at_step(place, STEPS // 2)
    job = _job(cluster)
    _slurm(cluster, "scontrol", "requeue", job)
    code = wait(flow)
    if code or "Restarts=1" not in _slurm(cluster, "scontrol", "show", "job", job):
        raise RuntimeError(f"the flow ended with {code}, or the job was not restarted; see {place.folder}/flow.log")
    return f"the flow ended with 0, the job has restarted once{_nobody(place)}"


def rank_dies(place: Place, cluster: Cluster) -> str:
    """kill -9 of the second node's rank."""
    flow = at_step(place, STEPS // 2)
    os.kill(_pids(place, "radlads.tasks.jobs.train.train", "RANK=1"), signal.SIGKILL)
    return _ended(place, cluster, flow, 3, r"ended with exit code \d+ \(SIGKILL")


def node_dies(place: Place, cluster: Cluster) -> str:
    """kill -9 of the second node's program: its ranks and the first node's are ended."""
    flow = at_step(place, STEPS // 2)
    os.kill(_pids(place, "radlads.tasks.launchers.remote.node", "SLURM_NODEID=1"), signal.SIGKILL)
    return _ended(place, cluster, flow, 3, r"distill was stopped by Slurm or on a node: .*: Killed|distill crashed: .*")


def flow_dies(place: Place, cluster: Cluster) -> str:
    """kill -9 of the flow: its job goes on, and the next flow follows it."""
    flow = at_step(place, STEPS // 4)
    flow.kill()
    flow.wait()
    job = _job(cluster)
    code = wait(place.start())
    said = (place.folder / "flow.log").read_text(encoding="utf-8")
    if code or f"following Slurm job {job}," not in said or said.count("submitted Slurm job") != _SUBMITTED:
        raise RuntimeError(f"the next flow ended with {code}, or started a second job; see {place.folder}/flow.log")
    return f"the next flow followed the same job to its end{_nobody(place)}"


def flow_is_interrupted(place: Place, cluster: Cluster) -> str:
    """Ctrl-C: the job saves a checkpoint and ends before the flow does."""
    flow = at_step(place, STEPS // 2)
    flow.send_signal(signal.SIGINT)
    wait(flow)
    left = _slurm(cluster, "squeue", "--noheader")
    if left:
        raise RuntimeError(f"a job is left: {left}")
    return f"{place.rows()} steps on record{_nobody(place)}"


SLURM_CASES: dict[str, Callable[[Place, Cluster], str]] = {
    "the Slurm job is cancelled": cancelled,
    "the Slurm job is requeued": requeued,
    "the Slurm job's second rank is killed": rank_dies,
    "the Slurm job's second node program is killed": node_dies,
    "the Slurm job's flow is killed": flow_dies,
    "the Slurm job's flow is interrupted": flow_is_interrupted,
}
_SUBMITTED = 1
"""Batch jobs of a flow: one, since the products of the stages before distill are copied."""


def _slurm(cluster: Cluster, *command: str) -> str:
    done = subprocess.run(command, env=os.environ | cluster, capture_output=True, text=True, check=True)
    return done.stdout


def _job(cluster: Cluster) -> str:
    return _slurm(cluster, "squeue", "--noheader", "--format=%i").split()[0]


def _pids(place: Place, program: str, variable: str) -> int:
    """The process of a program of this case that has a variable in its environment."""
    for pid, words in place.processes().items():
        inside = program in words and not any("engines.ranks" in word or "supervise" in word for word in words)
        if inside and variable.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise RuntimeError(f"there is no {program} with {variable}")


def _ended(place: Place, cluster: Cluster, flow: subprocess.Popen[bytes], code: int, words: str) -> str:
    began = time.monotonic()
    got = wait(flow)
    found = re.search(words, (place.folder / "flow.log").read_text(encoding="utf-8"))
    if got != code or found is None:
        raise RuntimeError(f"the flow ended with {got} and did not say '{words}'; see {place.folder}/flow.log")
    if _slurm(cluster, "squeue", "--noheader"):
        raise RuntimeError("the job is still in the queue")
    return f'after {time.monotonic() - began:.0f} s: "{found[0][:120]}…"{_nobody(place)}'


def _nobody(place: Place) -> str:
    """Wait until nothing of the case runs. Raises RuntimeError."""
    began = time.monotonic()
    while left := place.processes():
        if time.monotonic() - began > _GONE_SECONDS:
            raise RuntimeError(f"processes {sorted(left)} are left")
        time.sleep(0.1)
    return f", nobody left {time.monotonic() - began:.0f} s later"
