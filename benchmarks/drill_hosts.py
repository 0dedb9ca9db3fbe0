"""Cases of the drill on two hosts over ssh: a rank, a host, the network and the flow's machine fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from drill_case import LIMIT_SECONDS, RECIPE, STEPS, Place, wait
from ssh_lab import Lab, Machine

_GONE_SECONDS = 40.0
"""Silence that is taken for death, and the time for a last checkpoint."""
TWO_RANKS = {"device": "cpu", "processes": 2, "threads": 1}


def set_resources(place: Place, resources: dict[str, object]) -> None:
    """Give a case the drill's recipe with other resources."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {"resources": resources}
    place.recipe = place.folder / "recipe.yaml"
    place.recipe.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def on_hosts(place: Place, lab: Lab) -> None:
    """Have a case's flow run its jobs on the two machines."""
    hosts = [f"{machine.name} slots=1" for machine in lab.machines]
    remote = {"ssh_config": str(lab.ssh_config), "work": str(place.folder / "hosts")}
    set_resources(place, {"launcher": "hosts", "hosts": hosts, "device": "cpu", "threads": 1, "remote": remote})


def rank_dies(place: Place, lab: Lab) -> str:
    """kill -9 of the second host's rank."""
    flow = at_step(place, STEPS // 2)
    os.kill(_of_job(lab.machines[1])["rank"], signal.SIGKILL)
    return _ended(place, lab, flow, rf"on host {lab.machines[1].name}: ended with exit code \d+ \(SIGKILL")


def supervisor_dies(place: Place, lab: Lab) -> str:
    """kill -9 of the first host's supervisor; its warden ends the ranks."""
    flow = at_step(place, STEPS // 2)
    os.kill(_of_job(lab.machines[0])["supervisor"], signal.SIGKILL)
    return _ended(place, lab, flow, rf"on host {lab.machines[0].name}: ended with exit code")


def host_dies(place: Place, lab: Lab) -> str:
    """kill -9 of everything on the second host, its sshd included; it comes back."""
    flow = at_step(place, STEPS // 2)
    lab.machines[1].kill()
    try:
        return _ended(place, lab, flow, f"host {lab.machines[1].name} was lost: ")
    finally:
        lab.start_sshd(lab.machines[1])


def network_is_cut(place: Place, lab: Lab) -> str:
    """The second host's network is cut: nothing is closed, all ends by silence."""
    flow = at_step(place, STEPS // 2)
    lab.machines[1].cut()
    try:
        return _ended(
            place, lab, flow, rf"host {lab.machines[1].name} was lost: nothing was heard of it for 20 seconds"
        )
    finally:
        lab.machines[1].join()


def flow_dies(place: Place, lab: Lab) -> str:
    """kill -9 of the flow: both hosts save a checkpoint and end."""
    flow = at_step(place, STEPS // 2)
    flow.kill()
    flow.wait()
    return f"{place.rows()} steps on record{_nobody(lab)}"


def flow_is_interrupted(place: Place, lab: Lab) -> str:
    """Ctrl-C: both hosts save a checkpoint and end before the flow does."""
    flow = at_step(place, STEPS // 2)
    flow.send_signal(signal.SIGINT)
    wait(flow)
    return f"{place.rows()} steps on record{_nobody(lab)}"


HOSTS_CASES: dict[str, Callable[[Place, Lab], str]] = {
    "the second host's rank is killed": rank_dies,
    "the first host's supervisor is killed": supervisor_dies,
    "the second host is killed, its sshd included": host_dies,
    "the second host's network is cut": network_is_cut,
    "the flow of two hosts is killed": flow_dies,
    "the flow of two hosts is interrupted": flow_is_interrupted,
}


def at_step(place: Place, step: int) -> subprocess.Popen[bytes]:
    """Start a case's flow and wait until a step is on record. Raises RuntimeError if it ends before."""
    flow, end = place.start(), time.monotonic() + LIMIT_SECONDS
    while place.rows() < step:
        if flow.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the flow ended before step {step}; see {place.folder}/flow.log")
        time.sleep(0.01)
    return flow


def _of_job(machine: Machine) -> dict[str, int]:
    """Role → pid of the job's processes on a machine."""
    found: dict[str, int] = {}
    for pid in machine.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "radlads.tasks.launchers.supervise" in words:
            found.setdefault("supervisor", pid)
        elif "radlads.tasks.jobs.train.train" in words and "radlads.tasks.jobs.train.engines.ranks" not in words:
            found["rank"] = pid
    return found


def _ended(place: Place, lab: Lab, flow: subprocess.Popen[bytes], words: str) -> str:
    began = time.monotonic()
    code = wait(flow)
    said = (place.folder / "flow.log").read_text(encoding="utf-8")
    found = re.search(words, said)
    if code != 3 or found is None:
        raise RuntimeError(f"the flow ended with {code} and did not say '{words}'; see {place.folder}/flow.log")
    return f'after {time.monotonic() - began:.0f} s: "{found[0]}…"{_nobody(lab)}'


def _nobody(lab: Lab) -> str:
    """Wait until neither machine runs anything of a job. Raises RuntimeError."""
    began = time.monotonic()
    while left := [pid for machine in lab.machines for pid in machine.pids() if _is_ours(pid)]:
        if time.monotonic() - began > _GONE_SECONDS:
            raise RuntimeError(f"processes {left} are left on a host")
        time.sleep(0.1)
    return f", nobody left {time.monotonic() - began:.0f} s later"


def _is_ours(pid: int) -> bool:
    try:
        return b"radlads.tasks" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
