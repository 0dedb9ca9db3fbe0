"""Step checkpoints: the complete state that a killed job needs to resume exactly.

A checkpoint is a product under `<output>/checkpoints/step-000500/`, as safetensors and JSON: slices of fp32 masters,
Adam moments and (where one is kept) the average by parameter name (readable by any number of processes, at any ZeRO
stage), the random states of all ranks, the step, and the metrics so far. Its manifest is written last, then `latest`.

Every rank writes its own part. Training waits for a copy of it in host memory (`host_copy.py`); a thread hashes and
uploads that copy while training goes on (`parts.py`), and the first rank's thread commits once all parts are there.
The next save waits for these threads and raises their errors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, distributed

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import SCHEMA_VERSION, FileEntry, Manifest
from radlads.tasks.contracts.store.errors import older_schema
from radlads.tasks.contracts.store.names import MANIFEST
from radlads.tasks.contracts.store.open import CorruptArtifact
from radlads.tasks.jobs.checkpoints.checkpoint_sheet import VERSION, Checkpoint, CheckpointSheet
from radlads.tasks.jobs.checkpoints.host_copy import FILE_ELEMENTS, File, HostCopy
from radlads.tasks.jobs.checkpoints.parts import PartWriter
from radlads.tasks.jobs.checkpoints.random_state import read_random_state, seed_everything, write_random_state
from radlads.tasks.jobs.checkpoints.shelf import RECORD, Shelf, step_name
from radlads.tasks.jobs.checkpoints.state_slices import KINDS, StateSlice, into_files, kinds_of
from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.exit_reasons import write_json
from radlads.tasks.jobs.process_group import same_draw
from radlads.tasks.jobs.train.engines.engine import Engine

logger = logging.getLogger("radlads")


class Checkpoints:
    """The checkpoints of one job. Every rank calls the same methods in the same order; `save` and `wait` wait for no
    other rank.

    A context manager; its exit waits for a checkpoint that is being written.
    """

    def __init__(self, job: Job, engine: Engine, *, seed: int, keep: int, every: int = 0, reach: int = 0) -> None:
        """keep: how many of the newest to keep. every: multiples of it are kept for rollbacks, all of the last `reach`
        steps and one before; 0: none."""
        self.job, self.engine, self.seed, self.keep, self.every, self.reach = job, engine, seed, keep, every, reach
        self.shelf = Shelf(job.store, f"{job.output_prefix}/checkpoints")
        self._here: int | None = None  # the step whose checkpoint holds the present state
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        on_gpu = job.device.type == "cuda"
        self._host = HostCopy(min(job.world_size, torch.cuda.device_count()) if on_gpu else job.world_size)
        self._attempt, self._saves = same_draw(job.device), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._writing is not None:
            self._writing.join()  # the original error takes precedence

    def wait(self) -> None:
        """Wait until this rank has written its part, and the first rank until all have and it is committed. Raises the
        error that prevented it."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    # Saving

    def prepare(self) -> None:
        """Begin to allocate host memory for the first checkpoint of a GPU's state."""
        if self.job.device.type == "cuda":
            self._host.prepare(_files_of(self.engine.own_state()))

    def save(self, step: int) -> None:
        """Copy the state after `step` optimizer steps and start to write it. Raises errors of the previous save.

        Right after a restore of this step there is nothing to do: writing it again would risk the only copy."""
        self.wait()
        if step == self._here:
            return
        self._here = None
        began, own = time.perf_counter(), self.engine.own_state()
        if self.job.rank == 0:
            size = 4 * len(kinds_of(own)) * sum(parameter.numel() for parameter in self.engine.parameters.values())
            self.job.store.need_space(size, f"the checkpoint of step {step}")
        self._saves += 1
        mark = f"{self._attempt}{self._saves:04d}"
        writer = PartWriter(self.job.store, self.shelf.key(step), mark, self.job.rank)
        files = _files_of(own)
        random, sheets = read_random_state(), self._sheets(step)
        if self._host.fits(files):
            copies = self._host.take(files)
            write: Callable[[], list[FileEntry]] = partial(self._write, writer, files, copies, random, sheets)
        else:
            logger.warning(
                "no room in host memory for a copy of this rank's state: training waits while the checkpoint of step "
                "%d is written",
                step,
            )
            entries = self._write(writer, files, self._host.stream(files), random, sheets)
            write = partial(list, entries)
        stood = time.perf_counter() - began
        self._writing = threading.Thread(target=self._finish, args=(step, writer, write, stood), daemon=True)
        self._writing.start()

    def _sheets(self, step: int) -> dict[str, bytes]:
        """The files that only the first rank writes."""
        if self.job.rank != 0:
            return {}
        sheet = CheckpointSheet(
            version=VERSION,
            step=step,
            adam_steps=self.engine.adam_steps(),
            seed=self.seed,
            world_size=self.job.world_size,
            parameters={name: list(parameter.shape) for name, parameter in self.engine.parameters.items()},
        )
        record = self.job.scratch / RECORD
        kept = {RECORD: record.read_bytes()} if record.is_file() else {}
        return {"checkpoint.json": sheet.model_dump_json().encode(), **kept}

    def _write(
        self,
        writer: PartWriter,
        files: Sequence[File],
        copies: Iterable[Tensor],
        random: Tensor,
        sheets: dict[str, bytes],
    ) -> list[FileEntry]:
        """Write this rank's part, and tell the first rank how that ended."""
        try:
            self.job.confirm_lease()
            entries = writer.write(files, copies, random)
            if self.job.rank != 0:
                writer.announce(entries)
            return entries + [writer.put(name, [data]) for name, data in sheets.items()]
        except BaseException as error:
            if self.job.rank != 0:
                writer.give_up(error)
            raise

    def _finish(self, step: int, writer: PartWriter, write: Callable[[], list[FileEntry]], stood: float) -> None:
        try:
            began = time.perf_counter()
            entries = write()
            if self.job.rank == 0:
                entries += writer.others(self.job.world_size)
                self._commit(step, entries)
                logger.info(
                    "the checkpoint of step %d is committed: %.1f MB, written in %.1f s, training waited %.2f s",
                    step,
                    sum(entry.size for entry in entries) / 1e6,
                    time.perf_counter() - began,
                    stood,
                )
        except BaseException as error:  # noqa: BLE001 - raised again in the training thread, by wait()
            self._failure = error

    def _commit(self, step: int, entries: Sequence[FileEntry]) -> None:
        """Make the uploaded parts the checkpoint of a step, then delete what it replaces."""
        store, prefix = self.job.store, self.shelf.key(step)
        self.job.confirm_lease()
        store.delete(f"{prefix}/{MANIFEST}")  # of an attempt that could not be resumed; the one before it is intact
        files = tuple(sorted(entries, key=lambda entry: entry.path))
        manifest = self._manifest(step).model_copy(update={"files": files})
        store.adopt(prefix, manifest, guard=self.job.confirm_lease)
        self.job.confirm_lease()
        self.shelf.name_latest(step)
        store.delete(prefix, keep={f"{prefix}/{name}" for name in (MANIFEST, *(entry.path for entry in files))})
        self.shelf.drop_replaced(step, keep=self.keep, every=self.every, reach=self.reach)

    def _manifest(self, step: int) -> Manifest:
        spec = self.job.spec
        return Manifest(
            stage=spec.stage,
            digest=hashlib.sha256(f"{spec.digest}/{step_name(step)}".encode()).hexdigest(),
            spec={"checkpoint_of": spec.digest, "step": step},
            files=(),
            mlflow_run_id=spec.tracking.run_id if spec.tracking else None,
            code=code_version(),
            created_at=datetime.now(UTC),
        )

    # Restoring

    def restore(self) -> int:
        """Load the newest valid checkpoint; returns its step, or 0 if there is none. Sets the random generators.
        Collective: every rank reads what it holds."""
        self.wait()
        if self.job.rank == 0:
            self.job.confirm_lease()
            record = self.job.scratch / RECORD
            self.shelf.drop_given_up(record.read_bytes() if record.is_file() else b"")
            self.shelf.drop_remnants()
        step = self.find()
        if step is None:
            seed_everything(self.seed + self.job.rank)
            return 0
        self.load(step)
        return step

    def load(self, step: int) -> None:
        """Load a checkpoint that `find` has found, between any two steps. Sets the random generators."""
        folder = self._fetched(step)
        shapes = {name: parameter.shape for name, parameter in self.engine.parameters.items()}
        held = self.engine.held_state()
        with Checkpoint(folder, step, shapes, kinds_of(held)) as checkpoint:
            self.engine.set_adam_steps(checkpoint.sheet.adam_steps)
            checkpoint.load(held)
            state = checkpoint.random_state(self.job.rank)
        self.engine.settle()
        if state is not None:
            write_random_state(state)
        else:
            seed_everything(self.seed + self.job.rank + (step << 20))  # more ranks than before
        self._restore_record(folder, step)
        self._here = step
        self.job.barrier()
        if self.job.local_rank == 0:
            shutil.rmtree(self._marker.parent, ignore_errors=True)
        logger.info("continuing from the checkpoint of step %d", step)

    def find(self, latest: int | None = None) -> int | None:
        """The newest step with a valid checkpoint, with `latest` a multiple of `every` up to there; None if there is
        none. Rank 0 finds it."""
        chosen = torch.full((1,), -1, dtype=torch.int64, device=self.job.device)
        if self.job.rank == 0:
            steps = self.shelf.committed()
            if latest is not None:
                steps = [step for step in steps if step <= latest and step % self.every == 0]
            chosen[0] = next((step for step in steps if self._verifies(step)), -1)
        distributed.broadcast(chosen, src=0)
        return None if chosen.item() < 0 else int(chosen.item())

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a rollback has given them up. No upload may be pending."""
        if self.job.rank == 0:
            self.job.confirm_lease()
            self.shelf.drop_after(step)

    def _verifies(self, step: int) -> bool:
        store, prefix = self.job.store, self.shelf.key(step)
        try:
            manifest = store.read_manifest(prefix)
            if manifest is not None and manifest.schema_version != SCHEMA_VERSION:
                raise UserError(older_schema(store.join(prefix), manifest))
            if manifest is None or manifest.spec.get("checkpoint_of") != self.job.spec.digest:
                raise UserError(f"{store.join(prefix)} is a checkpoint of another product; delete it")
            self._fetch(step)
        except CorruptArtifact as error:  # other errors, such as an outage, must not discard progress
            logger.warning("skipping the checkpoint of step %d: %s", step, error)
            return False
        return True

    def _fetch(self, step: int) -> Path:
        folder = self.job.scratch / "restoring" / step_name(step)
        folder.mkdir(parents=True, exist_ok=True)
        fetched = self.job.store.fetch(self.shelf.key(step), folder)
        write_json(self._marker, {"folder": str(fetched)})
        return fetched

    @property
    def _marker(self) -> Path:
        return self.job.scratch / "restoring" / "here.json"

    def _fetched(self, step: int) -> Path:
        """The local folder of the checkpoint; downloads it once per machine."""
        if self.job.rank != 0 and self.job.local_rank == 0:
            self._fetch(step)
        self.job.barrier()
        return Path(json.loads(self._marker.read_text(encoding="utf-8"))["folder"])

    def _restore_record(self, folder: Path, step: int) -> None:
        """Restore metrics.jsonl as it was saved, unless this machine's goes on from there."""
        saved, here = folder / RECORD, self.job.scratch / RECORD
        if self.job.rank != 0 or not saved.is_file():
            return
        # Another machine may have gone on from an earlier step: what this one has on record is then another history.
        if not here.is_file() or not here.read_bytes().startswith(saved.read_bytes()):
            shutil.copyfile(saved, here)


def _files_of(own: Sequence[StateSlice]) -> list[list[StateSlice]]:
    """A rank's part of the state, divided over files of one size in bytes."""
    return into_files(own, FILE_ELEMENTS * len(KINDS) // len(kinds_of(own)))
