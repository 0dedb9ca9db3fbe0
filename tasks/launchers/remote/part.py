"""One host's part in a job: its folder, its ranks under the supervisor, and how they ended.

One rank that dies takes the others with it, whose errors then only say that a connection was closed. Clocks and polls
are too coarse to tell which ending was first, so the first cause among the endings of all hosts is found by what they
say.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobSpec, LeaseRef
from radlads.tasks.contracts.parsing.files import private_folder, write_private
from radlads.tasks.contracts.process_tree import MARK, end_leftovers, job_id, new_mark
from radlads.tasks.launchers.devices import count_cores
from radlads.tasks.launchers.local import (
    FINAL,
    Meeting,
    describe_code,
    job_environment,
    kernel_cache,
    render_command,
    run_process,
)
from radlads.tasks.launchers.progress import read_json
from radlads.tasks.launchers.remote.papers import CONTINUED
from radlads.tasks.launchers.remote.wire import SILENCE_SECONDS
from radlads.tasks.launchers.stopping import ORDERLY_SECONDS

_POLL_SECONDS = 0.5
_CONSEQUENCE = re.compile(r"(?i)connection|broken pipe|\bpeer\b|gloo|nccl|recvvalue|socket|DistBackend|timed? ?out")


class HostPart:
    """The part of the host with number meeting.node. base: the environment that the job's is made from.

    spec.scratch: this host's own folder for the job. threads: of a rank; None: this host's cores, shared by its ranks.
    """

    def __init__(self, spec: JobSpec, meeting: Meeting, base: Mapping[str, str], threads: int | None) -> None:
        cores = threads or max(1, count_cores() // meeting.slots[meeting.node])
        self.spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"threads": cores})})
        self.scratch, self.log = Path(spec.scratch), Path(spec.scratch, "log.txt")
        self._meeting, self._base = meeting, base

    def prepare(self, record: Mapping[str, str]) -> None:
        """Wait for the end of an earlier attempt's processes, then set up the folder. record: name → text of the files
        of earlier attempts that the job goes on with. Raises UserError."""
        end = time.monotonic() + SILENCE_SECONDS + 3 * ORDERLY_SECONDS
        while True:
            try:
                end_leftovers(job_id(self.scratch), seconds=ORDERLY_SECONDS)
                break
            except BlockingIOError as error:  # it ends by itself once it misses the machine that started it
                if time.monotonic() >= end:
                    raise UserError(f"{self.scratch} is in use: {error}; wait until it ends, or stop it") from None
                time.sleep(_POLL_SECONDS)
        private_folder(self.scratch)
        for name in ("exit.json", "progress.json", *CONTINUED):
            (self.scratch / name).unlink(missing_ok=True)
        for name, text in record.items():
            write_private(self.scratch / name, text)
        write_private(self.scratch / "job.json", self.spec.model_dump_json(indent=1))
        self.log.touch()

    def run(self, on_tick: Callable[[], None], grace_seconds: float) -> tuple[int, dict[str, Any] | None]:
        """Run this host's ranks to their end; returns the exit code and exit.json. on_tick: called about once a
        second. A request in stopping.REQUEST stops them."""
        command = render_command(
            self.spec,
            self.scratch / "job.json",
            port=self._meeting.port,
            visible=self._base.get("CUDA_VISIBLE_DEVICES"),
            meeting=self._meeting,
        )
        environment = kernel_cache(self.spec) | job_environment(
            self._base, self.spec.resources, self._meeting.interface
        )
        code = run_process(
            command,
            env=environment | {MARK: new_mark(job_id(self.scratch))},
            cwd=self.scratch,
            log=self.log,
            on_tick=on_tick,
            grace_seconds=grace_seconds,
        )
        return code, read_json(self.scratch / "exit.json")

    def hand_over(self, lease: dict[str, Any]) -> None:
        """Leave the ranks another lease (Job.confirm_lease)."""
        self.spec = self.spec.model_copy(update={"lease": LeaseRef.model_validate(lease)})
        write_private(self.scratch / "job.json", self.spec.model_dump_json(indent=1))

    def remove(self) -> None:
        """Free the disk after the product was committed."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.scratch.parent)


@dataclass(frozen=True)
class PartEnding:
    """How one host's part ended. code: exit code of its supervisor. record: exit.json. lost: why its connection ended;
    asked: it was stopped by the launcher, so this ending is no cause."""

    host: str
    code: int = 0
    record: dict[str, Any] | None = None
    lost: str | None = None
    asked: bool = False

    @property
    def is_done(self) -> bool:
        """Whether all ranks of the host completed."""
        return self.lost is None and self.code == 0


def job_ending(endings: Sequence[PartEnding]) -> tuple[int, dict[str, Any] | None]:
    """(exit code, exit.json) of the whole job. endings: of all hosts, the first host's first."""
    if all(one.is_done for one in endings):
        return 0, endings[0].record
    first = min(endings, key=_order)
    where = f"on host {first.host}: "
    if first.lost is not None:
        return 1, {"reason": "crash", "message": f"host {first.host} was lost: {first.lost}", "rank": -1}
    if first.record is not None and first.record.get("reason") not in (None, "done"):
        message = str(first.record.get("message", ""))
        if first.record["reason"] != "preempted":
            message = where + message
        return first.code or 1, first.record | {"message": message}
    return first.code or 1, {
        "reason": "crash", "message": f"{where}ended with {describe_code(first.code)} and gave no reason", "rank": -1,
    }  # fmt: skip


def _order(ending: PartEnding) -> int:
    reason = (ending.record or {}).get("reason")
    message = str((ending.record or {}).get("message", ""))
    if reason in FINAL:
        return 0
    if ending.is_done:
        return 9
    if ending.lost is not None and not ending.asked:
        return 1
    if reason == "preempted":
        return 2
    if reason == "crash":
        return 7 if _CONSEQUENCE.search(message) else 4
    return 8 if ending.asked else 3 if ending.code > 128 else 5
