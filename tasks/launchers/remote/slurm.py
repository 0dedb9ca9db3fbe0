"""The launcher `slurm`: each job that computes on a device is a batch job.

A batch job outlives its flow: the next attempt finds it by the product that it makes, follows it, and leaves it its own
lease. Slurm may requeue it; it then goes on from its newest checkpoint under the same id. Its folder must lie on a file
system that the nodes share.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef
from radlads.tasks.contracts.parsing.credentials import child_environment
from radlads.tasks.contracts.parsing.files import write_private
from radlads.tasks.contracts.recipe.machines import Slurm
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.contracts.stages import ALIGN
from radlads.tasks.contracts.store.open import Store, open_store
from radlads.tasks.launchers.launcher import JobCrashed, JobFailed, Launcher
from radlads.tasks.launchers.local import LocalLauncher, attempt, has_ranks
from radlads.tasks.launchers.progress import Progress, log_end, read_json
from radlads.tasks.launchers.remote import slurm_commands as slurm
from radlads.tasks.launchers.remote.facts import expected
from radlads.tasks.launchers.remote.node import ORDER, STOP, Order, ending_name
from radlads.tasks.launchers.remote.part import PartEnding, job_ending
from radlads.tasks.launchers.remote.placing import machines_resources, on_this_machine, runs_here
from radlads.tasks.launchers.remote.slurm_commands import NOT_SHARED, SlurmOutage, State
from radlads.tasks.launchers.stopping import REQUEST, Stopper

_log = logging.getLogger("prefect.radlads")
_LOOK_SECONDS = 2.0
_TICK_SECONDS = 0.5
_CANCEL_SECONDS = 120.0
"""Within which a cancelled job is gone: KillWait, and the nodes' clean-up."""
_SETTLE_SECONDS = 10.0
"""After a job's end, within which a shared file system shows what its nodes wrote last."""


class SlurmLauncher(Launcher):
    """Stages without a device run on the flow's machine."""

    def __init__(self, requested: Resources) -> None:
        self._requested, self._slurm = requested, requested.slurm or Slurm()
        slurm.check_extra(self._slurm.extra)
        self._local = LocalLauncher()

    def resources(self, requested: Resources) -> JobResources:
        """As the recipe says; this machine is not looked at. Raises UserError."""
        ranks = self._slurm.nodes * self._slurm.gpus_per_node
        return machines_resources(requested, ranks, "resources.slurm")

    def check(self, store: Store, work: Path) -> None:
        """Have Slurm check the options, as if a job were submitted. Raises UserError with its reason."""
        try:
            if not slurm.has_accounting():
                _log.warning(
                    "this Slurm keeps no accounting: the state of a job is known for some minutes after its end only "
                    "(MinJobAge), then from what the job itself wrote"
                )
            probe = JobSpec(
                stage=ALIGN.name, run="check", recipe="check", digest="0" * 64, spec={}, output_uri="check",
                store=StoreRef(uri=store.uri), resources=self.resources(self._requested), scratch=str(work),
            )  # fmt: skip
            slurm.submit(self._script(probe, self._slurm, 60.0), probe, dict(os.environ), test_only=True)
        except SlurmOutage as error:
            raise UserError(f"Slurm cannot be reached: {error}; `scontrol ping` shows its controllers") from None

    def hold_devices(self, resources: JobResources, purpose: str) -> AbstractContextManager[None]:
        """Slurm gives each job devices of its own."""
        return nullcontext()

    def run(
        self, spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
    ) -> None:
        """As Launcher.run."""
        if runs_here(spec):
            self._local.run(on_this_machine(spec), on_progress=on_progress, grace_seconds=grace_seconds)
            return

        def work(log: Path, on_tick: Callable[[], None]) -> int:
            found = self._adopt(spec, grace_seconds)
            if found is not None:
                code = _BatchJob(spec, found, on_tick, grace_seconds).until_the_end()
                if code == 0 or REQUEST.asked_at is not None:
                    return code
                _log.warning("%s: Slurm job %s, of an earlier attempt, ended with %d", spec.stage, found, code)
            return _BatchJob(spec, self._submit(spec, grace_seconds), on_tick, grace_seconds).until_the_end()

        attempt(spec, f"as Slurm job {slurm.job_name(spec)}", on_progress, work)

    def _adopt(self, spec: JobSpec, grace_seconds: float) -> str | None:
        """A job of an earlier attempt that still makes this product here. One in another folder is ended: its lease is
        lost, and this process could not follow it."""
        try:
            job = slurm.find_job(spec)
            if job is None:
                return None
            if slurm.state_of(job).folder == str(Path(spec.scratch).resolve()):
                _log.info("%s: following Slurm job %s, which an earlier attempt has submitted", spec.stage, job)
                return job
            _log.warning("%s: ending Slurm job %s, which works in another folder", spec.stage, job)
            slurm.cancel(job)
            wait_for_end(job, _CANCEL_SECONDS + grace_seconds)
        except SlurmOutage as error:
            raise JobCrashed(f"{spec.stage}: Slurm cannot be reached: {error}") from None
        return None

    def _submit(self, spec: JobSpec, grace_seconds: float) -> str:
        scratch, nodes = Path(spec.scratch), self._slurm if has_ranks(spec) else _one_rank(self._slurm)
        (scratch / STOP).unlink(missing_ok=True)
        folder, gpus = self._requested.remote.work or str(scratch), nodes.gpus_per_node
        order = Order(
            expected=expected(open_store(spec.store), gpus if spec.resources.device == "cuda" else 0, folder),
            ranks=gpus,
            threads=self._requested.threads,
            grace_seconds=grace_seconds,
            interface=self._requested.remote.interface,
            work=self._requested.remote.work,
        )
        write_private(scratch / ORDER, order.model_dump_json())
        try:
            job = slurm.submit(self._script(spec, nodes, grace_seconds), spec, {**os.environ, **child_environment()})
        except UserError as error:
            raise JobFailed(f"{spec.stage}: {error}") from None
        except SlurmOutage as error:
            raise JobCrashed(f"{spec.stage}: Slurm cannot be reached: {error}") from None
        _log.info("%s: submitted Slurm job %s", spec.stage, job)
        return job

    def _script(self, spec: JobSpec, nodes: Slurm, grace_seconds: float) -> str:
        return slurm.render_script(spec, nodes, self._requested.remote, grace_seconds=grace_seconds)


class _BatchJob:
    """Follows a batch job of this process or of an earlier one."""

    def __init__(self, spec: JobSpec, job: str, on_tick: Callable[[], None], grace_seconds: float) -> None:
        self._spec, self._job, self._on_tick, self._grace = spec, job, on_tick, grace_seconds
        self._scratch = Path(spec.scratch)
        self._out = self._scratch / f"slurm-{job}.out"
        self._said = ""
        self._stops = 0

    def until_the_end(self) -> int:
        """The job's exit code, with exit.json in the scratch folder. Raises JobFailed if somebody cancelled the job,
        and whatever on_tick raises, after the job was stopped."""
        stopper = Stopper(self._stop)
        looked_at = 0.0
        try:
            while True:
                self._on_tick()
                stopper.look()
                if time.monotonic() - looked_at >= _LOOK_SECONDS:
                    looked_at = time.monotonic()
                    state = self._look()
                    if state is not None and state.is_over:
                        return self._conclude(state)
                time.sleep(_TICK_SECONDS)
        except BaseException as error:
            if not isinstance(error, JobFailed):
                self._wind_down()
            raise

    def _look(self) -> State | None:
        """The job's state; None while Slurm does not answer. Changes are logged."""
        try:
            state = slurm.state_of(self._job)
            said = f"{state.name}{f': {state.reason}' if state.name == 'PENDING' else ''}"
        except SlurmOutage as error:
            state, said = None, f"Slurm does not answer ({error}); the job goes on"
        if said != self._said:
            self._said = said
            _log.info("%s: Slurm job %s: %s", self._spec.stage, self._job, said)
        return state

    def _stop(self) -> None:
        """For Stopper: the first call asks for a checkpoint, the second one cancels the job."""
        self._stops += 1
        if self._stops == 1:
            (self._scratch / STOP).touch()
            state = self._look()
            if state is None or state.name == "RUNNING":
                return
        try:
            slurm.cancel(self._job)
        except SlurmOutage as error:
            _log.warning("Slurm job %s could not be cancelled: %s", self._job, error)

    def _wind_down(self) -> None:
        """Stop the job, unless another flow follows it by now: then job.json has that one's lease."""
        lease = (read_json(self._scratch / "job.json") or {}).get("lease")
        if self._spec.lease is not None and lease != self._spec.lease.model_dump():
            return
        self._stop()
        if not wait_for_end(self._job, self._grace):
            self._stops = 1
            self._stop()
            wait_for_end(self._job, _CANCEL_SECONDS)

    def _conclude(self, state: State) -> int:
        """Write exit.json: from what the nodes said, else from what Slurm says."""
        endings = self._endings(state)
        code, ending = job_ending(endings) if endings else (1, None)
        if ending is not None and ending.get("reason") == "done":
            code = 0  # the product is committed, whatever ended the job after that
        elif self._stops == 0 and state.name.startswith("CANCELLED"):
            raise JobFailed(
                f"{self._spec.stage}: Slurm job {self._job} was cancelled; start the run again to continue from its "
                "newest checkpoint"
            )
        elif self._stops == 0 and not endings and (state.exit_code == f"{NOT_SHARED}:0" or not self._out.exists()):
            raise JobFailed(
                f"{self._spec.stage}: Slurm job {self._job} ended ({state.describe()}) without its folder "
                f"{self._scratch}: the work folder must lie on a file system that the nodes share (--work)"
            )
        elif ending is None or (ending.get("reason") == "crash" and ending.get("rank") == -1):
            said = f"{ending['message']}; " if ending is not None else ""
            ending = {"reason": "crash", "message": f"{said}{self._described(state)}", "rank": -1}
        elif ending.get("reason") == "preempted" and self._stops == 0:
            _log.warning("%s was stopped by Slurm or on a node: %s", self._spec.stage, self._described(state))
        if ending is not None:
            write_private(self._scratch / "exit.json", json.dumps(ending))
        return code

    def _described(self, state: State) -> str:
        """What Slurm says of the job, and the last lines of its batch script."""
        what = "Slurm has forgotten it" if state.name == slurm.GONE else state.describe()
        last = log_end(self._out, 0)[-6:] if self._out.exists() else []
        return "; ".join([f"Slurm job {self._job}: {what}", *(line.strip() for line in last)])

    def _endings(self, state: State) -> list[PartEnding]:
        """What the nodes wrote of the last attempt; a shared file system may show it late."""
        end = time.monotonic() + _SETTLE_SECONDS
        while True:
            names = [
                ending_name(f"{self._job}.{state.restarts}", node) for node in range(self._spec.resources.processes)
            ]
            found = [record for name in names if (record := read_json(self._scratch / name)) is not None]
            if found or time.monotonic() > end:
                return [PartEnding(str(one["host"]), int(one["code"]), one["exit"]) for one in found]
            time.sleep(_TICK_SECONDS)


def wait_for_end(job: str, seconds: float) -> bool:
    """Whether a job ended within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if slurm.state_of(job).is_over:
                return True
        except SlurmOutage:
            pass
        time.sleep(_LOOK_SECONDS / 4)
    return False


def _one_rank(asked: Slurm) -> Slurm:
    return asked.model_copy(update={"nodes": 1, "gpus_per_node": 1})
