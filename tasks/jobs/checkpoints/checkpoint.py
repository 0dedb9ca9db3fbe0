"""Step checkpoints: the complete state that a killed job needs to resume exactly.

A checkpoint is a product under `<output>/checkpoints/step-000500/`, as safetensors and JSON: fp32 masters and Adam
moments by parameter name (readable by any number of processes), the random states of all ranks, the step, and the
metrics so far. Its manifest is written last, then `latest`. The upload runs concurrently with training; the next save
waits for it and raises its error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

from radlads.tasks.contracts.disk import need_space
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.events import event_rows, rollback_target
from radlads.tasks.contracts.job import SCHEMA_VERSION, Manifest
from radlads.tasks.contracts.store.errors import older_schema
from radlads.tasks.contracts.store.open import CorruptArtifact
from radlads.tasks.jobs.checkpoints.checkpoint_sheet import KINDS, VERSION, open_checkpoint
from radlads.tasks.jobs.checkpoints.random_state import gather_random_states, seed_everything, write_random_state
from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.exit_reasons import write_json
from radlads.tasks.jobs.train.engine import Engine

logger = logging.getLogger("radlads")

_SHARD_BYTES = 2 << 30
_STATE_BYTES = 12  # per parameter: fp32 master and two moments
_STEP = re.compile(r"/step-(\d+)/manifest\.json$")


class Checkpoints:
    """The checkpoints of one job. Collective: every rank calls the same methods; rank 0 writes.

    A context manager; its exit waits for a pending upload.
    """

    def __init__(self, job: Job, engine: Engine, *, seed: int, keep: int, every: int = 0, reach: int = 0) -> None:
        """keep: how many of the newest to keep. every: multiples of it are kept for rollbacks, all of the last `reach`
        steps and one before; 0: none."""
        self.job, self.engine, self.seed, self.keep, self.every, self.reach = job, engine, seed, keep, every, reach
        self.prefix = f"{job.output_prefix}/checkpoints"
        self._upload: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._upload is not None:
            self._upload.join()  # the original error takes precedence

    def wait(self) -> None:
        """Wait for the pending upload. Raises its error."""
        if self._upload is not None:
            self._upload.join()
            self._upload = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    # Saving

    def save(self, step: int) -> None:
        """Write the state after `step` optimizer steps and start its upload. Raises errors of the previous upload."""
        self.wait()
        folder = self.job.scratch / "saving" / _name(step)
        if self.job.rank == 0:
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.mkdir(parents=True)
            need_space(folder, _STATE_BYTES * self._num_parameters(), f"the checkpoint of step {step}")
        parameters = self._write_parameters(folder)
        states = gather_random_states(self.job.device)
        if self.job.rank != 0:
            return
        save_file({"states": states}, folder / "random.safetensors")
        record = self.job.scratch / "metrics.jsonl"
        if record.is_file():
            shutil.copyfile(record, folder / "metrics.jsonl")
        write_json(
            folder / "checkpoint.json",
            {
                "version": VERSION,
                "step": step,
                "adam_steps": self.engine.adam_steps(),
                "seed": self.seed,
                "world_size": self.job.world_size,
                "parameters": parameters,
            },
        )
        self._upload = threading.Thread(target=self._upload_quietly, args=(folder, step), daemon=True)
        self._upload.start()

    def _num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.engine.parameters.values())

    def _write_parameters(self, folder: Path) -> dict[str, str]:
        """Write shards of parameters and moments on rank 0; returns parameter name → file. Collective."""
        files: dict[str, str] = {}
        pending: dict[str, Tensor] = {}
        size = number = 0
        names = list(self.engine.parameters)
        for name in names:
            tensors = self.engine.read(name)
            if self.job.rank != 0:
                continue
            for kind, tensor in tensors.items():
                pending[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
                size += tensor.numel() * 4
            files[name] = f"state-{number:05d}.safetensors"
            if size >= _SHARD_BYTES or name == names[-1]:
                save_file(pending, folder / files[name])
                pending, size, number = {}, 0, number + 1
        return files

    def _upload_quietly(self, folder: Path, step: int) -> None:
        try:
            self._commit(folder, step)
        except BaseException as error:  # noqa: BLE001 - raised again in the training thread, by wait()
            self._failure = error

    def _commit(self, folder: Path, step: int) -> None:
        store, prefix = self.job.store, f"{self.prefix}/{_name(step)}"
        self.job.confirm_lease()
        store.delete(prefix)  # remnants of a failed attempt; the previous checkpoint is intact
        store.commit(prefix, folder, self._manifest(step), guard=self.job.confirm_lease)
        self.job.confirm_lease()
        store.put_bytes(f"{self.prefix}/latest", f"{_name(step)}\n".encode())
        steps = self._committed_steps()
        spaced = [one for one in steps if self.every and one % self.every == 0]
        oldest = next((one for one in spaced if one <= step - self.reach), 0)
        for old in set(steps[self.keep :]) - {one for one in spaced if one >= oldest}:
            store.delete(f"{self.prefix}/{_name(old)}")
        shutil.rmtree(folder, ignore_errors=True)

    def _manifest(self, step: int) -> Manifest:
        spec = self.job.spec
        return Manifest(
            stage=spec.stage,
            digest=hashlib.sha256(f"{spec.digest}/{_name(step)}".encode()).hexdigest(),
            spec={"checkpoint_of": spec.digest, "step": step},
            files=(),
            mlflow_run_id=spec.tracking.run_id if spec.tracking else None,
            code=code_version(),
            created_at=datetime.now(UTC),
        )

    def _committed_steps(self) -> list[int]:
        """Steps with a manifest, newest first."""
        matches = (_STEP.search(key) for key in self.job.store.list(self.prefix))
        return sorted((int(match.group(1)) for match in matches if match), reverse=True)

    # Restoring

    def restore(self) -> int:
        """Load the newest valid checkpoint; returns its step, or 0 if there is none. Sets the random generators."""
        self._finish_rollback()
        step = self.find()
        if step is None:
            seed_everything(self.seed + self.job.rank)
            return 0
        self.load(step)
        return step

    def load(self, step: int) -> None:
        """Load a checkpoint that `find` has found, between any two steps. Sets the random generators."""
        folder = self._fetched(step)
        checkpoint = open_checkpoint(folder, step, {name: p.shape for name, p in self.engine.parameters.items()})
        self.engine.set_adam_steps(checkpoint.adam_steps)
        for name, tensors in _read_parameters(folder, checkpoint.parameters):
            self.engine.write(name, tensors)
        with safe_open(folder / "random.safetensors", "pt") as file:
            states = file.get_tensor("states")
        if self.job.rank < len(states):
            write_random_state(states[self.job.rank])
        else:
            seed_everything(self.seed + self.job.rank + (step << 20))  # more ranks than before
        self._restore_record(folder, step)
        self.job.barrier()
        if self.job.local_rank == 0:
            shutil.rmtree(self._marker.parent, ignore_errors=True)
        logger.info("continuing from the checkpoint of step %d", step)

    def find(self, latest: int | None = None) -> int | None:
        """The newest step with a valid checkpoint, with `latest` a multiple of `every` up to there; None if there is
        none. Rank 0 finds it."""
        chosen = torch.full((1,), -1, dtype=torch.int64, device=self.job.device)
        if self.job.rank == 0:
            steps = self._committed_steps()
            if latest is not None:
                steps = [step for step in steps if step <= latest and step % self.every == 0]
            chosen[0] = next((step for step in steps if self._verifies(step)), -1)
        distributed.broadcast(chosen, src=0)
        return None if chosen.item() < 0 else int(chosen.item())

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: a rollback has given them up. No upload may be pending."""
        if self.job.rank == 0:
            self.job.confirm_lease()
            for later in self._committed_steps():
                if later > step:
                    self.job.store.delete(f"{self.prefix}/{_name(later)}")
            self.job.store.put_bytes(f"{self.prefix}/latest", f"{_name(step)}\n".encode())

    def _finish_rollback(self) -> None:
        """Discard what a rollback on record has given up, if the job was killed before it could. Checkpoints that are
        younger than the rollback are not meant: they were made after it, perhaps on another machine."""
        rows = event_rows(self.job.scratch / "metrics.jsonl") if self.job.rank == 0 else []
        past = [(target, row["time"]) for row in rows if (target := rollback_target(row)) is not None]
        for step in self._committed_steps() if past else []:
            key = f"{self.prefix}/{_name(step)}"
            with suppress(CorruptArtifact):
                manifest = self.job.store.read_manifest(key)
                made = 0.0 if manifest is None else manifest.created_at.timestamp() * 1000
                if any(step > target and made < time for target, time in past):
                    logger.info("deleting the checkpoint of step %d, which a rollback has given up", step)
                    self.job.store.delete(key)

    def _verifies(self, step: int) -> bool:
        store, prefix = self.job.store, f"{self.prefix}/{_name(step)}"
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
        folder = self.job.scratch / "restoring" / _name(step)
        folder.mkdir(parents=True, exist_ok=True)
        fetched = self.job.store.fetch(f"{self.prefix}/{_name(step)}", folder)
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
        saved, here = folder / "metrics.jsonl", self.job.scratch / "metrics.jsonl"
        if self.job.rank != 0 or not saved.is_file():
            return
        # Another machine may have gone on from an earlier step: what this one has on record is then another history.
        if not here.is_file() or not here.read_bytes().startswith(saved.read_bytes()):
            shutil.copyfile(saved, here)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _read_parameters(folder: Path, files: dict[str, str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, {param, exp_avg, exp_avg_sq}) for each parameter of a checkpoint."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(folder / file, "pt")) for file in dict.fromkeys(files.values())}
        for name, file in files.items():
            yield name, {kind: opened[file].get_tensor(f"{kind}/{name}") for kind in KINDS}
