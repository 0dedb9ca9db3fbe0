"""The two documents exchanged between the planes: JobSpec to the data plane, Manifest back. There are no others."""

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

ExitReason = Literal["done", "preempted", "config", "out-of-memory", "disk-full", "nonfinite", "watch", "crash"]


class Sheet(BaseModel):
    """Base of models that cross a process boundary: frozen, strict, JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InputRef(Sheet):
    """A committed product that a job reads."""

    uri: str
    """The prefix that holds manifest.json."""
    digest: str


class StoreRef(Sheet):
    """The store's address. It never contains credentials: the SDK's own chain finds them on the machine."""

    uri: str
    """`s3://bucket/prefix`, or a folder."""
    endpoint_url: str | None = None
    region: str | None = None


class LeaseRef(Sheet):
    """The lease on a job's product: the job writes only while the lease has this token and this owner."""

    key: str
    """The key of lease.json in the store."""
    token: int
    owner: str = ""
    """Unique to this acquisition: a lease that was removed and created again may have the same token."""


class TrackingRef(Sheet):
    """The run of MLflow, or of Weights & Biases, that a job continues."""

    uri: str
    experiment: str
    run_id: str
    name: str = ""
    """Of a run of W&B: `RUN / stage`."""
    folder: str = ""
    """Where W&B keeps its files."""


class JobResources(Sheet):
    """A job's devices, resolved by the control plane from the recipe's `resources` and the machine."""

    device: Literal["cpu", "cuda"]
    processes: int = Field(ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 1
    threads: int = Field(ge=1)
    offload_optimizer: bool = False
    cuda_graphs: Literal["off", "auto", "on"] = "off"
    gpu_memory_gib: float | None = None
    dollars_per_gpu_hour: float | None = None


class JobSpec(Sheet):
    """The full description of one job: a process, or one DeepSpeed job."""

    schema_version: int = SCHEMA_VERSION
    stage: Stage
    run: str
    recipe: str
    digest: str
    spec: dict[str, Any]
    """The stage's part of the recipe and everything else that determines its product; the input of `digest`."""
    inputs: dict[str, InputRef] = Field(default_factory=dict)
    output_uri: str
    """The prefix that the job commits to: <store>/products/<stage>/<digest>."""
    store: StoreRef
    tracking: TrackingRef | None = None
    lease: LeaseRef | None = None
    """The lease on the product."""
    resources: JobResources
    scratch: str = Field(pattern=r"^[^\x00-\x1f]+$")
    """The job's own folder on this machine: job.json, log.txt, exit.json, metrics.jsonl, files to upload."""
    content_cache: str | None = None
    """File on this machine that caches hashes of large files; see tasks/contracts/pins/content.py."""


class FileEntry(Sheet):
    """One file of a product."""

    path: str
    """Relative to the product's prefix, with forward slashes."""
    size: int = Field(ge=0)
    sha256: str
    stored_as: str | None = None
    """Its path under the prefix if an unfinished attempt had left other content at `path`. Readers that use Store never
    see it."""


class CodeVersion(Sheet):
    """The code that made a product."""

    sha: str | None
    """Git commit of the project's checkout; None when installed from a wheel."""
    dirty: bool = False
    versions: dict[str, str]


class Manifest(Sheet):
    """The description of a job's product. Written last: no manifest, no artifact."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    digest: str
    inputs: dict[str, InputRef] = Field(default_factory=dict)
    spec: dict[str, Any]
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Results to compare, and small tables (lists of numbers); strict JSON, no NaN."""
    run: str = ""
    """The run that made it; runs with the same digest share it."""
    mlflow_run_id: str | None = None
    code: CodeVersion
    kernels: dict[str, str] = Field(default_factory=dict)
    """Operator → the kernel that computed it, and why no faster one; of the first rank."""
    created_at: datetime


def first_fault(error: ValidationError) -> str:
    """A validation error's first fault and its location, in one line; values are not repeated."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"][:8])
    text = f"{place}: {fault['msg']}" if place else fault["msg"]
    return " ".join(text.encode("unicode_escape").decode().split())[:300]


def read_job(path: Path) -> JobSpec:
    """The job that a file describes. Raises UserError, one line, for a file that is not a job.json of this version."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_JOB_BYTES + 1)
        if len(data) > _MOST_JOB_BYTES:
            raise UserError(f"{path} is larger than {_MOST_JOB_BYTES:,} bytes; it is not a job.json")
        spec = JobSpec.model_validate_json(data)
        canonical_json(spec.spec).encode()
    except ValidationError as error:
        raise UserError(f"{path} is not a job.json of this version: {first_fault(error)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a job.json of this version: it has a value that JSON forbids") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if spec.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {spec.schema_version}, this program reads {SCHEMA_VERSION}")
    return spec


def canonical_json(value: Any) -> str:
    """Canonical JSON of a value: sorted keys, no spaces, no NaN. Raises ValueError for values that JSON forbids."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def stage_digest(stage: Stage, spec: dict[str, Any], inputs: dict[str, InputRef]) -> str:
    """sha256 (hex) of the canonical {stage, spec, input digests, schema version}."""
    parts = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "spec": spec,
        "inputs": {name: ref.digest for name, ref in inputs.items()},
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()
