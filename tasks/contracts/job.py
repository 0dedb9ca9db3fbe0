"""The two sheets of paper between the planes: JobSpec goes down, Manifest comes up. Nothing else crosses."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.stages import Stage

SCHEMA_VERSION = 3
_MOST_JOB_BYTES = 64 << 20

ExitReason = Literal["done", "preempted", "config", "out-of-memory", "disk-full", "nonfinite", "crash"]


class Sheet(BaseModel):
    """Base of what crosses a process boundary: frozen, strict, JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InputRef(Sheet):
    """A committed product that a job reads."""

    uri: str
    """The prefix that holds manifest.json."""
    digest: str


class StoreRef(Sheet):
    """How to reach the store. Credentials are never part of it: the SDK's own chain finds them on the machine."""

    uri: str
    """`s3://bucket/prefix`, or a folder."""
    endpoint_url: str | None = None
    region: str | None = None


class LeaseRef(Sheet):
    """The lease on the product that a job makes: it writes only while the lease still has this token and this owner."""

    key: str
    """Of lease.json in the store."""
    token: int
    owner: str = ""
    """Of this acquisition: a lease that was removed and made again may have the same token."""


class TrackingRef(Sheet):
    """The MLflow run that a job continues."""

    uri: str
    experiment: str
    run_id: str


class JobResources(Sheet):
    """Resolved by the control plane from the recipe's `resources` and the machine."""

    device: Literal["cpu", "cuda"]
    processes: int = Field(ge=1)
    zero_stage: Literal[0, 1, 2] = 1
    threads: int = Field(ge=1)
    offload_optimizer: bool = False
    gpu_memory_gib: float | None = None
    dollars_per_gpu_hour: float | None = None


class JobSpec(Sheet):
    """What is asked of one process (or one DeepSpeed job)."""

    schema_version: int = SCHEMA_VERSION
    stage: Stage
    run: str
    recipe: str
    digest: str
    spec: dict[str, Any]
    """The stage's part of the recipe and whatever else determines its product; what `digest` is made of."""
    inputs: dict[str, InputRef] = Field(default_factory=dict)
    output_uri: str
    """The prefix that the job commits to: <store>/products/<stage>/<digest>."""
    store: StoreRef
    tracking: TrackingRef | None = None
    lease: LeaseRef | None = None
    """On the product."""
    resources: JobResources
    scratch: str = Field(pattern=r"^[^\x00-\x1f]+$")
    """The job's own folder on this machine: job.json, log.txt, exit.json, metrics.jsonl, what it is about to upload."""
    content_cache: str | None = None
    """File on this machine that remembers what large files hold; see tasks/contracts/pins/content.py."""


class FileEntry(Sheet):
    """One file of a product."""

    path: str
    """Relative to the product's prefix, with forward slashes."""
    size: int = Field(ge=0)
    sha256: str
    stored_as: str | None = None
    """Where it lies under the prefix, when an unfinished attempt with other content already had `path`. Readers that go
    through Store never see it."""


class CodeVersion(Sheet):
    """What produced a product."""

    sha: str | None
    """Git commit of the project's checkout; None when installed from a wheel."""
    dirty: bool = False
    versions: dict[str, str]


class Manifest(Sheet):
    """What a job produced. Written last: no manifest, no artifact."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    digest: str
    inputs: dict[str, InputRef] = Field(default_factory=dict)
    spec: dict[str, Any]
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Numbers worth comparing, and small tables (lists of numbers); strict JSON, no NaN."""
    run: str = ""
    """The run that had it made; others that ask for the same share it."""
    mlflow_run_id: str | None = None
    code: CodeVersion
    kernels: dict[str, str] = Field(default_factory=dict)
    """Operator → the kernel that ran it, and why no faster one; of the first rank."""
    created_at: datetime


def first_fault(error: ValidationError) -> str:
    """The first thing that a schema found wrong, and where, in one line; values are not repeated."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"][:8])
    told = f"{place}: {fault['msg']}" if place else fault["msg"]
    return " ".join(told.encode("unicode_escape").decode().split())[:300]


def read_job(path: Path) -> JobSpec:
    """The job that a file describes. Raises UserError, one line, for a file that is no job.json of this version."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_JOB_BYTES + 1)
        if len(data) > _MOST_JOB_BYTES:
            raise UserError(f"{path} is larger than {_MOST_JOB_BYTES:,} bytes; it is no job.json")
        spec = JobSpec.model_validate_json(data)
        canonical_json(spec.spec).encode()
    except ValidationError as error:
        raise UserError(f"{path} is no job.json of this version: {first_fault(error)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no job.json of this version: it holds what JSON cannot") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if spec.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {spec.schema_version}, this program reads {SCHEMA_VERSION}")
    return spec


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN. Raises ValueError for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def stage_digest(stage: Stage, spec: dict[str, Any], inputs: dict[str, InputRef]) -> str:
    """sha256 (hex) of the canonical {stage, spec, input digests, schema version}."""
    sheet = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "spec": spec,
        "inputs": {name: ref.digest for name, ref in inputs.items()},
    }
    return hashlib.sha256(canonical_json(sheet).encode()).hexdigest()
