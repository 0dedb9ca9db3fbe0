"""Common parts of every job: reading job.json, ranks, inputs, the product, and the exit record.

A job is one program, `python -m radlads.tasks.jobs.<x> job.json`, or several ranks of it under the DeepSpeed launcher.
In every case `exit.json` in the scratch folder records how it ended; a product exists once its manifest does.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from radlads.kernels.shared.chosen import chosen_kernels, forget_kernels
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import ExitReason, InputRef, JobSpec, Manifest, read_job
from radlads.tasks.contracts.parsing.credentials import HidingFormatter, learn
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import check_pins
from radlads.tasks.contracts.specs import parse_spec
from radlads.tasks.jobs import process_group as group
from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.exit_reasons import (
    EXIT_CODES,
    NonFiniteError,
    Preempted,
    explain,
    keep_folder,
    prepare_ending,
    write_ending,
    write_json,
)
from radlads.tasks.jobs.ownership import confirm_or_follow
from radlads.tasks.jobs.progress_file import ProgressFile
from radlads.tasks.jobs.waiting import announce_commit, forget_commit, wait_for, wait_for_commit

if TYPE_CHECKING:  # imported where used, so that a job without torch or S3 does not load them
    import torch

    from radlads.tasks.contracts.store.open import Store
    from radlads.tasks.contracts.tracking import MetricsRecord

logger = logging.getLogger("radlads")

__all__ = ["Job", "NonFiniteError", "Preempted", "execute", "open_job", "run_job", "write_json"]


class NoRecord:
    """Replaces MetricsRecord on every rank but the first, which alone writes the record."""

    def _ignore(self, *_: object) -> None:
        pass

    log = event = rewind = params = artifact = close = _ignore


@dataclass
class Job:
    """One rank's view of the job it belongs to. `open_job` makes it."""

    spec: JobSpec
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    stop_requested: bool = False
    """SIGTERM was seen. A cooperative job saves its state and raises Preempted."""
    launched: float = field(default_factory=time.time)
    """When this attempt was launched (its job.json was written), in seconds since the epoch."""
    _inputs: dict[str, Path] = field(default_factory=dict)
    _record: MetricsRecord | NoRecord | None = None
    _store: Store | None = None

    @cached_property
    def typed(self) -> Any:
        """The stage's part of the job as its own type (TrainSpec, EvaluateSpec, ...)."""
        return parse_spec(self.spec.stage, self.spec.spec)

    @cached_property
    def hashes(self) -> ContentHashes:
        """Contents of files, each read once."""
        return ContentHashes(Path(self.spec.content_cache) if self.spec.content_cache else None)

    @property
    def scratch(self) -> Path:
        """The job's own folder on this machine."""
        return Path(self.spec.scratch)

    @property
    def output(self) -> Path:
        """Its contents are committed as the product when the job succeeds."""
        folder = self.scratch / "output"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        import torch

        return torch.device("cpu") if self.spec.resources.device == "cpu" else torch.device("cuda", self.local_rank)

    @property
    def dtype(self) -> torch.dtype:
        """The networks' compute dtype: the section's precision; by default bf16 on a GPU and fp32 on a CPU."""
        import torch

        precision = getattr(getattr(self.typed, "section", None), "precision", "auto")
        if precision == "auto":
            precision = "fp32" if self.spec.resources.device == "cpu" else "bf16"
        return torch.bfloat16 if precision == "bf16" else torch.float32

    @property
    def store(self) -> Store:
        """Where products live."""
        if self._store is None:
            from radlads.tasks.contracts.store.open import open_store

            self._store = open_store(self.spec.store)
        return self._store

    @property
    def output_prefix(self) -> str:
        """The key, in the store, of this job's product."""
        return self.store.key(self.spec.output_uri)

    @property
    def record(self) -> MetricsRecord | NoRecord:
        """metrics.jsonl and its MLflow mirror; a no-op on all ranks but the first."""
        if self._record is None:
            if self.rank == 0:
                from radlads.tasks.contracts.tracking import MetricsRecord

                self._record = MetricsRecord(self.scratch / "metrics.jsonl", self.spec.tracking)
            else:
                self._record = NoRecord()
        return self._record

    def input(self, name: str) -> Path:
        """Folder with the verified files of an input product. Every rank calls it; one rank of a machine fetches."""
        if name in self._inputs:
            return self._inputs[name]
        reference = self._reference(name)
        marker = self.scratch / "inputs" / f"{name}.json"
        if self.local_rank == 0:
            marker.unlink(missing_ok=True)
        self.barrier()  # remove the remains of an earlier attempt
        if self.local_rank == 0:
            folder = self.scratch / "inputs" / name
            folder.mkdir(parents=True, exist_ok=True)
            manifest = self.input_manifest(name)
            if manifest.digest != reference.digest:
                raise UserError(
                    f"input '{name}' at {reference.uri} holds another product than the one this job was planned with "
                    f"(digest {manifest.digest[:12]}, expected {reference.digest[:12]}); start the run again"
                )
            write_json(marker, {"folder": str(self.store.fetch(self.store.key(reference.uri), folder))})
        wait_for(marker, self.scratch)
        self._inputs[name] = Path(json.loads(marker.read_text(encoding="utf-8"))["folder"])
        return self._inputs[name]

    def input_manifest(self, name: str) -> Manifest:
        """The manifest of an input product. Raises UserError if the input is missing."""
        reference = self._reference(name)
        manifest = self.store.read_manifest(self.store.key(reference.uri))
        if manifest is None:
            raise UserError(
                f"input '{name}' is not there: {reference.uri} has no manifest; run the stage that makes it"
            )
        return manifest

    def _reference(self, name: str) -> InputRef:
        if name not in self.spec.inputs:
            given = ", ".join(self.spec.inputs) or "none"
            raise UserError(f"stage {self.spec.stage} needs the input '{name}'; this job was given: {given}")
        return self.spec.inputs[name]

    @cached_property
    def shown(self) -> ProgressFile:
        """What is shown of the job while it runs."""
        return ProgressFile(self.scratch, self.rank)

    def progress(self, done: float, total: float, unit: str) -> None:
        """Report the job's progress (progress.json, at most about once a second)."""
        self.shown.write(done, total, unit)

    def open_process_group(self) -> None:
        """Join the other ranks (gloo on a CPU, nccl on a GPU); a no-op once joined."""
        group.join_group(self.device, self.rank, self.world_size)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            from torch import distributed

            distributed.barrier()

    def commit(self, metrics: dict[str, Any]) -> Manifest:
        """Make `output` the stage's product: upload, verify, manifest last. One rank calls it."""
        manifest = Manifest(
            stage=self.spec.stage,
            digest=self.spec.digest,
            inputs=self.spec.inputs,
            spec=self.spec.spec,
            files=(),
            metrics=metrics,
            run=self.spec.run,
            mlflow_run_id=self.spec.tracking.run_id if self.spec.tracking else None,
            code=code_version(),
            kernels=chosen_kernels(),
            created_at=datetime.now(UTC),
        )
        return self.store.commit(self.output_prefix, self.output, manifest, guard=self.confirm_lease)

    def confirm_lease(self) -> None:
        """Raises LeaseLost if another process now makes this product: this one must not commit its own."""
        if self.spec.lease is not None:
            self.spec = confirm_or_follow(self.store, self.spec, self.spec.lease)


JobMain = Callable[[Job], dict[str, Any] | None]


def run_job(main: JobMain, *, cooperative: bool = False) -> NoReturn:
    """Run a job's process from start to end: read job.json (first argument), call main, commit, write exit.json, exit.

    main fills `job.output` and returns the numbers for the manifest. cooperative: main watches `job.stop_requested`
    itself; otherwise SIGTERM raises Preempted at any point of the program.
    """
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m radlads.tasks.jobs.<job> job.json\n")
        sys.exit(EXIT_CODES["config"])
    group.follow_launcher()
    try:
        job = open_job(Path(sys.argv[1]))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_CODES["config"])
    _catch_sigterm(job, cooperative)
    reason = execute(main, job)
    group.leave_group(orderly=reason in ("done", "preempted", "nonfinite", "watch"))
    group.end_process(EXIT_CODES[reason])


def open_job(path: Path) -> Job:
    """Read job.json and determine this process's rank. The only place of a job that reads the environment."""
    learn(os.environ)
    spec = read_job(path)
    rank = int(os.environ.get("RANK", "0"))
    job = Job(
        spec=spec,
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        launched=path.stat().st_mtime,
    )
    job.scratch.mkdir(parents=True, exist_ok=True)
    handler = logging.StreamHandler(sys.stderr)
    ranks = f"[{rank}]" if job.world_size > 1 else ""
    handler.setFormatter(HidingFormatter(f"%(asctime)s %(levelname)s {spec.stage}{ranks} %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if rank == 0 else logging.WARNING)
    group.quiet_libraries()
    return job


def execute(main: JobMain, job: Job) -> ExitReason:
    """Call main, commit its output, record how it ended. Returns the reason; raises nothing."""
    with keep_folder(job.scratch, job.local_rank) as alone:
        if not alone:
            return "crash"
        forget_kernels()
        forget_commit(job.scratch, job.local_rank)
        reason, message = _attempt(main, job)
        write_ending(job.scratch, job.rank, reason, message)
        if job._record is not None:
            job._record.close()
        return reason


def _attempt(main: JobMain, job: Job) -> tuple[ExitReason, str]:
    try:
        prepare_ending(job.scratch, job.rank)
        group.set_threads(job.spec.resources.threads)
        if job.world_size > 1:
            job.open_process_group()
        if job.local_rank == 0:
            check_pins(job.typed, job.hashes)
        metrics = main(job) or {}
        if job.rank == 0:
            job.commit(metrics)
            announce_commit(job.scratch)
        # No rank may exit before the product exists: the launcher would then stop the others.
        wait_for_commit(job)
        job.barrier()
    except (Exception, Preempted, KeyboardInterrupt) as error:  # outermost handler: every exit is recorded
        reason, message = explain(error, job.scratch)
        if reason == "crash":
            logger.exception("the job failed")
        elif reason != "preempted":
            logger.error("%s", message)
        return reason, message
    return "done", ""


def _catch_sigterm(job: Job, cooperative: bool) -> None:
    def on_sigterm(_signal: int, _frame: FrameType | None) -> None:
        first = not job.stop_requested
        job.stop_requested = True
        if first and not cooperative:
            raise Preempted("stopped on request")

    signal.signal(signal.SIGTERM, on_sigterm)
