"""run_stage: returns a product that any run has made; otherwise launches the job and verifies its product.

It does not depend on the orchestrator. A product is made by one process at a time, which holds the lease on it. The
run's pointer is written first, so that the product is not collected as garbage between its lookup and its use.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from pydantic import ValidationError

from radlads.tasks.contracts.job import InputRef, JobResources, JobSpec, Manifest, TrackingRef
from radlads.tasks.contracts.locks.lease import Lease, LeaseHeld, LeaseLost, held_by, product_lease
from radlads.tasks.contracts.locks.scratch_lock import hold_folder
from radlads.tasks.contracts.specs import StageSpec, TokenizeSpec, spec_digest
from radlads.tasks.contracts.stages import Stage
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError, misplaced
from radlads.tasks.contracts.store.layout import product_key
from radlads.tasks.contracts.store.pointers import point
from radlads.tasks.launchers.launcher import JobCrashed, Launcher
from radlads.tasks.launchers.local import LocalLauncher
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.launchers.stopping import REQUEST
from radlads.tasks.look.note import Publisher

_log = logging.getLogger(__name__)
# Files that every job leaves for users, stored under `job/`, apart from the product's own files.
_PAPERS = ("job.json", "log.txt", "metrics.jsonl", "metrics-notes.json", "exit.json")
_CONTINUED = ("metrics.jsonl", "metrics-notes.json")
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class StageRequest:
    """One stage of one run.

    inputs: the products it reads. work: folder on this machine; scratch folders in it are named by digest, so that any
    run with the same digest resumes there. lease: on the run, needed to move its pointer; None: no pointer is moved.
    content_cache: see tasks/contracts/pins/content.py. launcher: what starts the job.
    """

    stage: Stage
    run: str
    recipe: str
    spec: StageSpec
    inputs: Mapping[str, InputRef]
    store: Store
    resources: JobResources
    work: Path
    grace_seconds: float = 60.0
    lease: Lease | None = None
    content_cache: Path | None = None
    launcher: Launcher = field(default_factory=LocalLauncher)

    @cached_property
    def digest(self) -> str:
        """The digest of the requested product."""
        return spec_digest(self.stage, self.spec, dict(self.inputs))

    @property
    def label(self) -> str:
        """The name of its pointer: "align", "tokenize-train"."""
        return stage_label(self.stage, self.spec)

    @property
    def key(self) -> str:
        """The product's prefix in the store."""
        return product_key(self.stage, self.digest)

    @property
    def scratch(self) -> Path:
        """The job's folder on this machine, kept until the product is committed so that a retry resumes from it."""
        return scratch_folder(self.work, self.stage, self.digest)


@dataclass(frozen=True)
class Product:
    """The product of a stage. reused: it existed already, and no job ran."""

    uri: str
    manifest: Manifest
    reused: bool

    @property
    def ref(self) -> InputRef:
        """The product as an input of a later stage."""
        return InputRef(uri=self.uri, digest=self.manifest.digest)


def stage_label(stage: str, spec: StageSpec) -> str:
    """The name of a stage's pointer."""
    return f"{stage}-{spec.name}" if isinstance(spec, TokenizeSpec) else stage


def scratch_folder(work: Path, stage: str, digest: str) -> Path:
    """The scratch folder of a product's job on this machine."""
    return work / "products" / stage / digest


def run_stage(
    request: StageRequest,
    *,
    open_tracking: Callable[[str], TrackingRef | None] = lambda digest: None,
    on_progress: Callable[[Progress], None] | None = None,
    slot: AbstractContextManager[object] | None = None,
) -> Product:
    """The stage's product, made by a job unless a run has made it already; waits while another process makes it.

    open_tracking: digest → the MLflow run that the job writes to; called only if a job is launched. slot: held while
    the job runs. Raises CorruptArtifact if the product is damaged, LeaseLost if another process has taken over this
    run, JobFailed (final), JobCrashed or JobPreempted (can be retried), RunStopped.
    """
    store, key, digest = request.store, request.key, request.digest
    if request.lease is not None:
        point(store, request.run, request.label, request.stage, digest, request.lease)
    # The lease was not released: its holder is cleaning up, or died before that, or is deleting the product.
    # Checked before the manifest: a collector releases its lease once the manifest is deleted.
    is_held = held_by(store, key) is not None
    committed = find_committed(store, key, digest)
    if committed is None or is_held:
        look = partial(_look, request)
        with product_held(store, request.stage, digest, request.scratch, request.run, look) as lease:
            committed = find_committed(store, key, digest)
            if committed is None:
                what = f"the folder {request.scratch}"
                with hold_folder(request.scratch, "stage.lock", what=what, wait_seconds=float("inf"), look=look):
                    return _make(request, lease, open_tracking, on_progress, slot)
    _finish(request, committed)
    return Product(uri=store.join(key), manifest=committed, reused=True)


@contextmanager
def product_held(
    store: Store, stage: Stage, digest: str, work: Path, run: str, look: Callable[[], None]
) -> Iterator[Lease]:
    """The lease on a product, for a run; waits while another process has it. look: called meanwhile; may raise."""
    said = ""
    while True:
        lease = product_lease(store, stage, digest, work, run=run, look=look)
        try:
            lease.__enter__()
            break
        except LeaseHeld as held:
            if held.by != said:
                said = held.by
                _log.warning("%s %s is being %s; waiting for it", stage, digest[:12], held.by)
            look()
            time.sleep(_POLL_SECONDS)
    try:
        yield lease
    finally:
        lease.__exit__(None, None, None)


def _look(request: StageRequest) -> None:
    """Raises RunStopped if the user stops the run, LeaseLost if another process has taken it over."""
    REQUEST.check()
    if request.lease is not None:
        request.lease.check()


def _make(
    request: StageRequest,
    lease: Lease,
    open_tracking: Callable[[str], TrackingRef | None],
    on_progress: Callable[[Progress], None] | None,
    slot: AbstractContextManager[object] | None,
) -> Product:
    store, key, digest, scratch = request.store, request.key, request.digest, request.scratch
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
        lease=lease.ref,
        resources=request.resources,
        scratch=str(scratch),
        content_cache=str(request.content_cache) if request.content_cache else None,
    )
    _leave_other_stores(request)
    restore_record(store, key, scratch)
    try:
        with slot or nullcontext(), Publisher(store, key, spec, lease) as note:
            watched = _while_ours((lease, request.lease), on_progress, note.see)
            request.launcher.run(spec, on_progress=watched, grace_seconds=request.grace_seconds)
    finally:
        if _is_ours(lease):
            _keep_papers(store, key, scratch)
    made = find_committed(store, key, digest)
    if made is None:
        raise JobCrashed(f"{request.stage} completed but committed nothing at {store.join(key)}")
    _clear_scratch(scratch)
    _drop_checkpoints(store, key)
    return Product(uri=store.join(key), manifest=made, reused=False)


def _while_ours(
    leases: tuple[Lease | None, ...], *told: Callable[[Progress], None] | None
) -> Callable[[Progress], None]:
    """Calls all of `told`; raises LeaseLost, which stops the job, once another process has taken over the product or
    the run."""

    def look(progress: Progress) -> None:
        for lease in leases:
            if lease is not None:
                lease.check()
        for tell in told:
            if tell is not None:
                tell(progress)

    return look


def _is_ours(lease: Lease) -> bool:
    """Whether this process may still write the job's files."""
    try:
        lease.confirm()
    except LeaseLost:
        return False
    except StoreError as error:  # an outage of the store stops other processes, too
        _log.warning("the lease could not be confirmed: %s", error)
    return True


def _finish(request: StageRequest, manifest: Manifest) -> None:
    """Clean up after a commit, in case the flow that committed died before its own clean-up."""
    store, key, scratch = request.store, request.key, request.scratch
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
    """Whether the scratch folder belongs to this product in this store: another store may have the same digest."""
    try:
        spec = JobSpec.model_validate_json((request.scratch / "job.json").read_bytes())
    except (OSError, ValidationError):
        return False
    return spec.output_uri == request.store.join(request.key)


def _leave_other_stores(request: StageRequest) -> None:
    """Move aside the files that a job for another store left in the scratch folder: their record is not this one's."""
    scratch = request.scratch
    if (scratch / "job.json").exists() and not _is_scratch_of(request):
        for name in _PAPERS:
            (scratch / name).unlink(missing_ok=True)
        _clear_scratch(scratch)


def find_committed(store: Store, key: str, digest: str) -> Manifest | None:
    """The manifest of a product whose files all exist; None if it is not committed. Raises CorruptArtifact."""
    manifest = store.read_manifest(key)
    if manifest is None:
        return None
    if manifest.digest != digest:
        raise misplaced(store.join(key), manifest.digest)
    store.verify(key, manifest)
    return manifest


def restore_record(store: Store, key: str, scratch: Path) -> None:
    """Fetch the record of earlier attempts from the store into a scratch folder that is new."""
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
        _log.warning("the record of %s stays in %s: %s", key, scratch, error)


def _drop_checkpoints(store: Store, key: str) -> None:
    """Delete the checkpoints of a committed product: no longer needed, they take several times its size."""
    try:
        store.delete(f"{key}/checkpoints")
    except StoreError as error:
        _log.warning("the checkpoints of %s could not be deleted: %s", key, error)


def _clear_scratch(scratch: Path) -> None:
    """The product is in the store: free the disk, keep the job's small files."""
    for path in scratch.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
