"""One host's part in a job: its folder, its ranks under the supervisor, and how they ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobSpec, LeaseRef
from radlads.tasks.contracts.parsing.files import private_folder, write_private
from radlads.tasks.contracts.process_tree import MARK, end_leftovers, job_id, new_mark
from radlads.tasks.launchers.devices import count_cores
from radlads.tasks.launchers.local import Meeting, job_environment, render_command, run_process
from radlads.tasks.launchers.progress import read_json
from radlads.tasks.launchers.remote.papers import CONTINUED
from radlads.tasks.launchers.remote.wire import SILENCE_SECONDS
from radlads.tasks.launchers.stopping import ORDERLY_SECONDS

_POLL_SECONDS = 0.5


class Part:
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
        environment = job_environment(self._base, self.spec.resources, self._meeting.interface)
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
