"""A product of the earlier layout: reads it, and links or copies its files to its current prefix."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import SCHEMA_VERSION, FileEntry, InputRef, JobSpec, Manifest, first_fault
from radlads.tasks.contracts.specs import PlanSpec, StageSpec, parse_spec
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.layout import RUNS
from radlads.tasks.contracts.store.names import place_of

_CHECKPOINT = re.compile(r"/checkpoints/(step-\d+)/manifest\.json$")


@dataclass(frozen=True)
class Former:
    """A product at an old prefix. manifest: None for an unfinished stage; job: None if its job.json is lost."""

    prefix: str
    manifest: Manifest | None
    job: JobSpec | None

    @property
    def _sheet(self) -> Manifest | JobSpec:
        sheet = self.manifest or self.job
        if sheet is None:
            raise UserError("its spec is lost")
        return sheet

    @property
    def stage(self) -> str:
        """Its stage."""
        return self._sheet.stage

    @property
    def digest(self) -> str:
        """Its digest in the earlier layout."""
        return self._sheet.digest

    @property
    def inputs(self) -> Mapping[str, InputRef]:
        """Its inputs, at their old places."""
        return self._sheet.inputs

    @property
    def run(self) -> str:
        """The run that made it; empty if unknown."""
        if self.prefix.startswith(f"{RUNS}/"):
            return self.prefix.split("/")[1]
        return self.job.run if self.job is not None else ""

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run with its curve."""
        if self.manifest is not None:
            return self.manifest.mlflow_run_id
        return self.job.tracking.run_id if self.job is not None and self.job.tracking is not None else None


def read_former(store: Store, prefix: str, work: Path) -> Former | None:
    """The product at an old prefix; None if there is none, finished or begun, that can be read. Raises CorruptArtifact.
    work: this machine's scratch. A killed flow did not store the job.json of its current stage; the file is still in
    scratch.
    """
    manifest = store.read_manifest(prefix)
    data = store.get_bytes(f"{prefix}/job/job.json")
    if manifest is None and data is None:
        data = _left_in_scratch(store, prefix, work)
    try:
        job = JobSpec.model_validate_json(data) if data is not None else None
    except ValidationError as error:
        if manifest is None:
            raise UserError(f"its job.json cannot be read: {first_fault(error)}") from None
        job = None
    return None if manifest is None and job is None else Former(prefix, manifest, job)


def _left_in_scratch(store: Store, prefix: str, work: Path) -> bytes | None:
    path = work / prefix.removeprefix(f"{RUNS}/") / "job.json"
    try:
        data = path.read_bytes()
        mine = JobSpec.model_validate_json(data).output_uri == store.join(prefix)
    except (OSError, ValidationError):
        return None
    return data if mine else None


def spec_of_today(former: Former) -> StageSpec:
    """The spec in its current form: newer keys have their defaults. Raises UserError."""
    given = dict(former._sheet.spec)
    if stage_info(former.stage).trains:
        given["section"] = {"decay_dtype": "float32"} | given["section"]  # it had no other
    spec = parse_spec(former.stage, given)
    return spec.model_copy(update={"run": former.run}) if isinstance(spec, PlanSpec) else spec


def move_product(
    store: Store, former: Former, key: str, digest: str, spec: StageSpec, inputs: Mapping[str, InputRef]
) -> bool:
    """Link or copy a product to its new prefix and verify it; returns whether it is committed. An unfinished one keeps
    its checkpoints.

    Raises CorruptArtifact, StoreError.
    """
    existing = store.read_manifest(key)
    if existing is not None:  # from an interrupted conversion, or two runs made the same product
        store.verify(key, existing)
        return True
    changes = {"schema_version": SCHEMA_VERSION, "digest": digest, "inputs": dict(inputs)}
    changes |= {"spec": spec.model_dump(mode="json")}
    _copy_record(store, former, key, changes)
    if former.manifest is None:
        _copy_checkpoints(store, former, key, digest)
        return False
    entries = _copy_files(store, former.prefix, key, former.manifest)
    store.adopt(key, former.manifest.model_copy(update=changes | {"files": entries, "run": former.run}))
    return True


def _copy_files(store: Store, old: str, new: str, manifest: Manifest) -> tuple[FileEntry, ...]:
    entries = []
    for entry in manifest.files:
        store.copy(place_of(old, entry), f"{new}/{entry.path}", entry)
        entries.append(entry.model_copy(update={"stored_as": None}))
    return tuple(entries)


def _copy_record(store: Store, former: Former, key: str, changes: Mapping[str, object]) -> None:
    """The job's files for users; job.json in its current form."""
    for place in store.list(f"{former.prefix}/job"):
        target = f"{key}/{place.removeprefix(f'{former.prefix}/')}"
        data = store.get_bytes(place)
        if data is not None and not place.endswith("/job.json"):
            store.put_bytes(target, data)
    if former.job is not None:
        update = {**changes, "output_uri": store.join(key), "store": store.ref, "lease": None, "run": former.run}
        store.put_bytes(f"{key}/job/job.json", former.job.model_copy(update=update).model_dump_json(indent=1).encode())


def _copy_checkpoints(store: Store, former: Former, key: str, digest: str) -> None:
    """Checkpoints of an unfinished stage, moved to its new prefix."""
    for place in store.list(f"{former.prefix}/checkpoints"):
        found = _CHECKPOINT.search(place)
        if found is None:
            continue
        name = found.group(1)
        old, new = f"{former.prefix}/checkpoints/{name}", f"{key}/checkpoints/{name}"
        manifest = store.open_manifest(old)
        if manifest.spec.get("checkpoint_of") != former.digest or store.read_manifest(new) is not None:
            continue
        entries = _copy_files(store, old, new, manifest)
        update = {
            "schema_version": SCHEMA_VERSION,
            "digest": hashlib.sha256(f"{digest}/{name}".encode()).hexdigest(),
            "spec": {**manifest.spec, "checkpoint_of": digest},
            "files": entries,
            "run": former.run,
        }
        store.adopt(new, manifest.model_copy(update=update))
    latest = store.get_bytes(f"{former.prefix}/checkpoints/latest")
    if latest is not None:
        store.put_bytes(f"{key}/checkpoints/latest", latest)
