"""Follows a job on several hosts, from the ranks' meeting to the first cause of its end."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from radlads.tasks.contracts.job import JobSpec
from radlads.tasks.contracts.parsing.files import write_private
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.launchers.remote.papers import CONTINUED, apply
from radlads.tasks.launchers.remote.part import PartEnding, job_ending
from radlads.tasks.launchers.remote.placing import forwarded, on_machine
from radlads.tasks.launchers.remote.ssh import Crew
from radlads.tasks.launchers.remote.wire import Message
from radlads.tasks.launchers.stopping import Stopper

_log = logging.getLogger("prefect.radlads")
_SETTLE_SECONDS = 5.0
"""Between the first bad ending and the end of the others: time for the host of the first cause to report it."""
_MEETING_SECONDS = 180.0
"""Within which the first host has ended an earlier attempt and set up its folder."""
_END_SECONDS = 30.0
"""Within which a host ends its part when told to, after the ranks' time for a checkpoint."""


def follow(crew: Crew, spec: JobSpec, requested: Resources, on_tick: Callable[[], None], grace_seconds: float) -> int:
    """Run a job on the hosts of a crew; returns its exit code, with exit.json in the scratch folder. Raises HostLost
    before the ranks have started, and whatever on_tick raises, after the job was stopped."""
    _start(crew, spec, requested, on_tick, grace_seconds)
    following = _HostsRun(crew, Path(spec.scratch))
    try:
        following.until_the_end(on_tick)
    except BaseException:
        following.stop(grace_seconds)
        following.until_the_end(lambda: None, time.monotonic() + grace_seconds + _END_SECONDS)
        raise
    code, ending = job_ending([following.endings[number] for number in range(len(crew.sessions))])
    if ending is not None:
        write_private(Path(spec.scratch, "exit.json"), json.dumps(ending))
    return code


def _start(crew: Crew, spec: JobSpec, requested: Resources, on_tick: Callable[[], None], grace_seconds: float) -> None:
    """Start the first host's part, which opens the place where the ranks meet, then the others."""
    hosts, scratch = [session.host for session in crew.sessions], Path(spec.scratch)
    numbers = range(len(hosts))
    addresses = {number: hello["address"] for number, hello in crew.collect("hello", numbers, on_tick).items()}
    shared = {
        "do": "run",
        "environment": forwarded(os.environ),
        "slots": [host.slots for host in hosts],
        "threads": requested.threads,
        "grace": grace_seconds,
        "interface": requested.remote.interface,
    }
    record = {name: (scratch / name).read_text("utf-8") for name in CONTINUED if (scratch / name).is_file()}
    meeting = None
    for number in numbers:
        part = on_machine(spec, hosts[number].name, requested.remote.work).model_dump(mode="json")
        peer = addresses[1] if number == 0 and len(hosts) > 1 else meeting and meeting[0]
        own = {"node": number, "spec": part, "peer": peer, "meeting": meeting, "record": record if number == 0 else {}}
        crew.sessions[number].send(**shared, **own)
        if number == 0:
            meeting = crew.collect("meeting", [0], on_tick, _MEETING_SECONDS)[0]["meeting"]


class _HostsRun:
    """endings: of the hosts that have ended, by number."""

    def __init__(self, crew: Crew, scratch: Path) -> None:
        self._crew, self._scratch = crew, scratch
        self.endings: dict[int, PartEnding] = {}
        self._told = False
        self._settled_at: float | None = None
        self._stopper = Stopper(self._stop_once)
        self._stops = 0

    def until_the_end(self, on_tick: Callable[[], None], deadline: float = float("inf")) -> None:
        """Until all hosts have ended, or the deadline, in monotonic seconds. A user's stop request is passed on."""

        def tick() -> None:
            on_tick()
            self._stopper.look()
            if self._settled_at is None and any(not ending.is_done for ending in self.endings.values()):
                self._settled_at = time.monotonic() + _SETTLE_SECONDS
            if self._settled_at is not None and time.monotonic() > self._settled_at and not self._told:
                self.stop(0.0)  # ranks that wait for one that is dead would wait for hours

        for number, message in self._crew.listen(tick):
            if number >= 0:
                self._take(number, message)
            if len(self.endings) == len(self._crew.sessions) or time.monotonic() > deadline:
                return

    def stop(self, seconds: float) -> None:
        """Have all hosts stop their ranks, with time for a checkpoint."""
        self._told = True
        for session in self._crew.sessions:
            session.send(do="stop", seconds=seconds)

    def _stop_once(self) -> None:
        """For Stopper: the first call stops, the second kills."""
        self._stops += 1
        self.stop(_END_SECONDS if self._stops == 1 else 0.0)

    def _take(self, number: int, message: Message) -> None:
        host = self._crew.sessions[number].host.name
        if "ended" in message:
            self.endings[number] = PartEnding(host, message["ended"], message["exit"], asked=self._told)
        elif "refused" in message:
            record = {"reason": "config", "message": message["refused"], "rank": -1}
            self.endings[number] = PartEnding(host, 2, record)
        elif "lost" in message and number not in self.endings:
            self.endings[number] = PartEnding(host, 1, lost=message["lost"], asked=self._told)
        elif "say" in message:
            _log.info("host %s: %s", host, message["say"])
        else:
            apply(self._scratch, message, "" if number == 0 else f"[{host}] ")
