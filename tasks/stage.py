"""run_stage: committed? return it. Else launch, verify, return. Knows nothing of the orchestrator."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from radlads.tasks.contracts.job import SCHEMA_VERSION, InputRef, JobResources, JobSpec, Manifest, TrackingRef
from radlads.tasks.contracts.locks.lease import Lease, LeaseLost
from radlads.tasks.contracts.locks.scratch_lock import hold_folder
from radlads.tasks.contracts.specs import StageSpec, spec_digest
from radlads.tasks.contracts.stages import Stage
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StageConflict, StoreError, conflict, older_schema
from radlads.tasks.launchers.launcher import JobCrashed, Launcher
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.launchers.registry import LAUNCHERS

_log = logging.getLogger(__name__)
# What a job leaves for people, however it ended. Under `job/`, apart from the product's own files.
_PAPERS = ("job.json", "log.txt", "metrics.jsonl", "metrics-notes.json", "exit.json")
_CONTINUED = ("metrics.jsonl", "metrics-notes.json")


@dataclass(frozen=True)
class StageRequest:
    """One stage of one run.

    inputs: the products it reads. output_key: the prefix that it commits to, in the store. scratch: its folder on this
    machine, kept until it is committed so that a retry can go on from it. lease: under which nobody else makes the run.
    content_cache: see tasks/contracts/pins/content.py. launcher: what starts the job.
    """

    stage: Stage
    run: str
    recipe: str
    spec: StageSpec
    inputs: Mapping[str, InputRef]
    output_key: str
    store: Store
    resources: JobResources
    scratch: Path
    grace_seconds: float = 60.0
    lease: Lease | None = None
    content_cache: Path | None = None
    launcher: Launcher = LAUNCHERS["local"]

    @property
    def digest(self) -> str:
        """Names what is asked for."""
        return spec_digest(self.stage, self.spec, dict(self.inputs))


@dataclass(frozen=True)
class Product:
    """What a stage made. reused: it was there already, and no job ran."""

    uri: str
    manifest: Manifest
    reused: bool

    @property
    def ref(self) -> InputRef:
        """As an input of a later stage."""
        return InputRef(uri=self.uri, digest=self.manifest.digest)


def run_stage(
    request: StageRequest,
    *,
    open_tracking: Callable[[str], TrackingRef | None] = lambda digest: None,
    on_progress: Callable[[Progress], None] | None = None,
    slot: AbstractContextManager[object] | None = None,
) -> Product:
    """The stage's product, made by a job unless it is committed already.

    open_tracking: digest → the MLflow run that the job writes to; called only if a job is launched. slot: held while
    the job runs. Raises StageConflict where another result is committed, CorruptArtifact where this one is damaged,
    JobFailed (final), JobCrashed or JobPreempted (may be tried again).
    """
    store, key, digest = request.store, request.output_key, request.digest
    committed = find_committed(store, key, digest)
    if committed is None:
        # Runs share datasets: whoever comes second waits, and takes what the first has made.
        what = f"the folder {request.scratch}"
        with hold_folder(request.scratch, "stage.lock", what=what, wait_seconds=math.inf) as waited:
            committed = find_committed(store, key, digest) if waited else None
            if committed is None:
                return _make(request, open_tracking, on_progress, slot)
    _finish(request, committed)
    return Product(uri=store.join(key), manifest=committed, reused=True)


def _make(
    request: StageRequest,
    open_tracking: Callable[[str], TrackingRef | None],
    on_progress: Callable[[Progress], None] | None,
    slot: AbstractContextManager[object] | None,
) -> Product:
    store, key, digest, lease = request.store, request.output_key, request.digest, request.lease
    tracking = open_tracking(digest)
    spec = JobSpec(
        stage=request.stage,
        run=request.run,
        recipe=request.recipe,
        digest=digest,
        spec=request.spec.model_dump(mode="json"),
        inputs=dict(request.inputs),
        output_uri=store.join(key),
        store=store.ref,
        tracking=tracking,
        lease=lease.ref if lease is not None else None,
        resources=request.resources,
        scratch=str(request.scratch),
        content_cache=str(request.content_cache) if request.content_cache else None,
    )
    restore_record(store, key, request.scratch)
    try:
        with slot or nullcontext():
            request.launcher.run(spec, on_progress=_while_ours(lease, on_progress), grace_seconds=request.grace_seconds)
    finally:
        if _is_ours(lease):
            _keep_papers(store, key, request.scratch)
    made = find_committed(store, key, digest)
    if made is None:
        raise JobCrashed(f"{request.stage} ended well but committed nothing at {store.join(key)}")
    _clear_scratch(request.scratch)
    _drop_checkpoints(store, key)
    return Product(uri=store.join(key), manifest=made, reused=False)


def _while_ours(lease: Lease | None, on_progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    """on_progress, which stops the job by raising LeaseLost once another process makes the run."""

    def look(progress: Progress) -> None:
        if lease is not None:
            lease.check()
        if on_progress is not None:
            on_progress(progress)

    return look


def _is_ours(lease: Lease | None) -> bool:
    """Whether the job's papers and its MLflow run are still this process's to write."""
    try:
        if lease is not None:
            lease.confirm()
    except LeaseLost:
        return False
    except StoreError as error:  # nobody can say otherwise either
        _log.warning("the lease could not be confirmed: %s", error)
    return True


def _finish(request: StageRequest, manifest: Manifest) -> None:
    """What follows a commit, where the flow that saw it died before it got there."""
    store, key, scratch = request.store, request.output_key, request.scratch
    store.settle(key, manifest)
    if store.list(f"{key}/checkpoints"):
        _drop_checkpoints(store, key)
    if _is_scratch_of(request):
        kept = store.sizes(f"{key}/job")
        here = {f"{key}/job/{name}": scratch / name for name in _PAPERS if (scratch / name).is_file()}
        if any(kept.get(name) != path.stat().st_size for name, path in here.items()):
            _keep_papers(store, key, scratch)
        _clear_scratch(scratch)


def _is_scratch_of(request: StageRequest) -> bool:
    """Whether the folder is this run's, for this product: it may be another store's, or another run's dataset."""
    try:
        spec = JobSpec.model_validate_json((request.scratch / "job.json").read_bytes())
    except (OSError, ValidationError):
        return False
    place = request.store.join(request.output_key)
    return (spec.run, spec.digest, spec.output_uri) == (request.run, request.digest, place)


def find_committed(store: Store, key: str, digest: str) -> Manifest | None:
    """The manifest at a place if it is the one asked for and all its files are there; None if there is none.

    Raises StageConflict, CorruptArtifact.
    """
    manifest = store.read_manifest(key)
    if manifest is None:
        return None
    if manifest.schema_version != SCHEMA_VERSION:
        raise StageConflict(older_schema(store.join(key), manifest))
    if manifest.digest != digest:
        raise conflict(store.join(key), manifest.digest, digest)
    store.verify(key, manifest)
    return manifest


def restore_record(store: Store, key: str, scratch: Path) -> None:
    """In a folder that has not seen this stage yet, the record of earlier attempts comes from the store."""
    scratch.mkdir(parents=True, exist_ok=True)
    for name in _CONTINUED:
        if not (scratch / name).exists():
            data = store.get_bytes(f"{key}/job/{name}")
            if data is not None:
                (scratch / name).write_bytes(data)


def _keep_papers(store: Store, key: str, scratch: Path) -> None:
    try:
        for name in _PAPERS:
            if (scratch / name).is_file():
                store.put_file(f"{key}/job/{name}", scratch / name)
    except (StoreError, OSError) as error:  # must not hide why the job ended
        _log.warning("the papers of %s stay in %s: %s", key, scratch, error)


def _drop_checkpoints(store: Store, key: str) -> None:
    """With the product committed there is nothing to resume, and optimizer states are several times the model."""
    try:
        store.delete(f"{key}/checkpoints")
    except StoreError as error:
        _log.warning("the checkpoints of %s stay there: %s", key, error)


def _clear_scratch(scratch: Path) -> None:
    """The product is in the store: free the disk, keep the papers."""
    for path in scratch.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
