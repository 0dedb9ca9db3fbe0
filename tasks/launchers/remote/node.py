"""The program on each node of a Slurm job: its part in the job. `python -m radlads.tasks.launchers.remote.node`.

The working directory is the job's scratch folder, which the nodes share with the flow's machine: what the flow writes
there (job.json, order.json, `stop`) is read, and what it follows is written: log.txt, metrics.jsonl, endings.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobSpec, Sheet, read_job
from radlads.tasks.contracts.parsing.credentials import hide, learn
from radlads.tasks.contracts.parsing.files import write_private
from radlads.tasks.launchers.local import LOOPBACK, Meeting, free_port
from radlads.tasks.launchers.progress import read_json
from radlads.tasks.launchers.remote.facts import Expected, address_of, address_toward, facts_of, fault_of, interface_of
from radlads.tasks.launchers.remote.papers import CONTINUED, Papers, apply
from radlads.tasks.launchers.remote.part import HostPart
from radlads.tasks.launchers.remote.placing import on_machine
from radlads.tasks.launchers.remote.slurm_commands import SlurmOutage, node_addresses
from radlads.tasks.launchers.stopping import REQUEST

ORDER = "order.json"
STOP = "stop"
"""Its presence asks the nodes to save a checkpoint and end."""
_MEETING_SECONDS = 300.0
_SETTLE_SECONDS = 5.0
"""Between a bad ending and this program's, at which srun ends the other nodes: one of them may know the cause."""
_CODE_CONFIG = 2


class Order(Sheet):
    """order.json: how a job's nodes run it. ranks: of each node. threads: of a rank; None: the node's cores, shared."""

    expected: Expected
    ranks: int
    threads: int | None
    grace_seconds: float
    interface: str | None
    work: str | None


@dataclass(frozen=True)
class Place:
    """This node in its job. attempt: the job's id and how often it was requeued; names files of this attempt."""

    node: int
    nodes: int
    names: str
    attempt: str


def ending_name(attempt: str, node: int) -> str:
    """The file in which a node says how its part ended."""
    return f"ending-{attempt}-{node}.json"


def main() -> int:
    """Run this node's part. Exit code: 0 if all of its ranks completed."""
    learn(os.environ)
    shared = Path.cwd()
    place = Place(
        int(os.environ["SLURM_NODEID"]),
        int(os.environ["SLURM_NNODES"]),
        os.environ["SLURM_JOB_NODELIST"],
        f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}",
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop())
    try:
        code, ending = _run(shared, place)
    except (UserError, SlurmOutage, OSError) as error:
        code, message = _CODE_CONFIG, hide(" ".join(str(error).split()))
        ending = {"reason": "config" if isinstance(error, UserError) else "crash", "message": message, "rank": -1}
    record = {"host": os.environ.get("SLURMD_NODENAME", str(place.node)), "code": code, "exit": ending}
    write_private(shared / ending_name(place.attempt, place.node), json.dumps(record))
    if code == 0 and place.node == 0:
        write_private(shared / "exit.json", json.dumps(ending))
    if code != 0 and REQUEST.asked_at is None:
        time.sleep(_SETTLE_SECONDS)
    return 0 if code == 0 else 1


def _stop() -> None:
    """Request a checkpoint and the end, once: Slurm may send the same signal by several ways, and kills by itself."""
    if REQUEST.asked_at is None:
        REQUEST.ask()


def _run(shared: Path, place: Place) -> tuple[int, dict[str, object] | None]:
    spec, order = read_job(shared / "job.json"), Order.model_validate_json((shared / ORDER).read_bytes())
    REQUEST.patience_seconds = order.grace_seconds
    _check(spec, order)
    name = os.environ.get("SLURMD_NODENAME", f"node{place.node}")
    meeting = _meet(shared, place, order)
    part = HostPart(on_machine(spec, name, order.work), meeting, os.environ, order.threads)
    record = {name: (shared / name).read_text("utf-8") for name in CONTINUED if (shared / name).is_file()}
    part.prepare(record if place.node == 0 else {})
    papers = Papers(part.scratch, part.log, records=place.node == 0)
    # The first node alone writes log.txt: a shared file system may lose lines that two append at the same time.
    lines = shared if place.node == 0 else shared / f"node-{place.node}"
    lines.mkdir(exist_ok=True)

    def look() -> None:
        for change in papers.changes():
            apply(lines if "log" in change else shared, change)
        _take_over(shared, part)
        if (shared / STOP).exists():
            _stop()

    code, ending = part.run(look, order.grace_seconds)
    while changes := papers.changes():
        for change in changes:
            apply(lines if "log" in change else shared, change)
    if code == 0:
        part.remove()
    return code, ending


def _check(spec: JobSpec, order: Order) -> None:
    """Raises UserError for what `fault_of` finds."""
    facts = facts_of(spec.store, order.work or str(Path.cwd()), os.environ.get("CUDA_VISIBLE_DEVICES"))
    fault = fault_of(facts, order.expected, facts["time"])  # munge requires that the cluster's clocks agree
    if fault is not None:
        raise UserError(f"this node {fault}")


def _take_over(shared: Path, part: HostPart) -> None:
    """Give the ranks the lease of a flow that follows this job in place of one that died."""
    lease = (read_json(shared / "job.json") or {}).get("lease")
    own = part.spec.lease.model_dump() if part.spec.lease is not None else None
    if lease is not None and own is not None and lease != own:
        part.hand_over(lease)


def _meet(shared: Path, place: Place, order: Order) -> Meeting:
    """Where the ranks meet: the first node says it in a file. Raises UserError, OSError, SlurmOutage."""
    slots, interface = (order.ranks,) * place.nodes, order.interface
    if place.nodes == 1:
        return Meeting(LOOPBACK, free_port(), slots, 0, "lo")
    file = shared / f"meeting-{place.attempt}.json"
    if place.node == 0:
        here = address_of(interface) if interface else address_toward(node_addresses(place.names)[1])
        port = free_port(here)
        write_private(file, json.dumps({"address": here, "port": port}))
        return Meeting(here, port, slots, 0, interface or interface_of(here))
    end = time.monotonic() + _MEETING_SECONDS
    while (found := read_json(file)) is None:
        if time.monotonic() > end:
            raise OSError(0, f"the first node has not said where the ranks meet within {_MEETING_SECONDS:.0f} seconds")
        time.sleep(0.2)
    interface = interface or interface_of(address_toward(found["address"]))
    return Meeting(found["address"], found["port"], slots, place.node, interface)


if __name__ == "__main__":
    sys.exit(main())
