"""Whether a job may still write its product, and whether that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from radlads.tasks.contracts.job import JobSpec, LeaseRef, read_job
from radlads.tasks.contracts.locks.lease import LeaseLost, confirm_lease
from radlads.tasks.contracts.store.errors import StoreError

if TYPE_CHECKING:
    from radlads.tasks.contracts.store.open import Store


def confirm_or_follow(store: Store, spec: JobSpec, lease: LeaseRef) -> JobSpec:
    """The job, with the lease that it has now. A flow that follows a job which outlived its first one writes its own
    lease into the job's file. Raises LeaseLost if another process now makes this product, StoreError."""
    try:
        confirm_lease(store, lease)
    except LeaseLost:
        file = Path(spec.scratch, "job.json")
        successor = read_job(file).lease if file.exists() else None
        if successor is None or successor == lease:
            raise
        confirm_lease(store, successor)
        return spec.model_copy(update={"lease": successor})
    return spec


def is_committed(store: Store, prefix: str, digest: str) -> bool:
    """Whether a product is in the store. An outage of the store answers no."""
    try:
        manifest = store.read_manifest(prefix)
    except StoreError:
        return False
    return manifest is not None and manifest.digest == digest
