"""MLflow: one experiment per recipe, a parent run per pipeline run, a child run per stage.

Runs are looked up by their tags, which name the store, the run and the digest, so a retry continues the same MLflow
run. MLflow is a mirror of the store and metrics.jsonl: if it cannot be reached, every function here logs that once and
returns. Weights are never uploaded, only their uri and sha256.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from radlads.tasks.contracts.job import TrackingRef
from radlads.tasks.contracts.metrics_record import MetricsRecord, connect
from radlads.tasks.contracts.mirrors.weights_biases import is_wandb, wandb_ref
from radlads.tasks.contracts.parsing.credentials import hide

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "Ending",
    "MetricsRecord",
    "RunIdentity",
    "add_params",
    "close_run",
    "flatten",
    "log_file",
    "metric_name",
    "nest_run",
    "open_pipeline_run",
    "open_stage_run",
    "open_sweep_run",
    "outage_is_no_error",
    "retag_run",
    "run_url",
    "settle_run",
]

_log = logging.getLogger(__name__)
_LONGEST_PARAM = 6000
_PARAMS_PER_BATCH = 100
_reported: set[str] = set()


Ending = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class RunIdentity:
    """The identity of a pipeline run in MLflow. Two stores that share a server may have runs with the same name."""

    store: str
    run: str


def open_pipeline_run(
    uri: str,
    experiment: str,
    identity: RunIdentity,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    running: bool = True,
) -> TrackingRef | None:
    """The parent run of a pipeline run, continued if there is one. None when MLflow cannot be reached.

    uri: `sqlite:////path/mlflow.db` or `http://server`. params are written once and never changed. running: set its
    status to running; otherwise its status is not changed.
    """
    marks = {"radlads.run": identity.run, "radlads.store_id": identity.store, "radlads.kind": "pipeline"}
    return _open(uri, experiment, identity.run, marks, {**marks, **(tags or {})}, params, running)


def open_stage_run(
    parent: TrackingRef,
    run: str,
    stage: str,
    digest: str,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    running: bool = True,
) -> TrackingRef | None:
    """The child run of a stage, `RUN / stage`, continued if there is one. None when MLflow cannot be reached.

    run: the pipeline run's name. stage: its name within the run, e.g. "align" or "tokenize train". digest: of its
    product; another digest gets a run, and so a curve, of its own.
    """
    if is_wandb(parent.uri):
        return wandb_ref(parent.uri, parent.folder, parent.experiment, f"{run} / {stage}", parent.run_id, digest)
    identity = {"mlflow.parentRunId": parent.run_id, "radlads.digest": digest}
    marks = {**identity, "radlads.stage": stage, "radlads.kind": "stage", **(tags or {})}
    return _open(parent.uri, parent.experiment, f"{run} / {stage}", identity, marks, params, running)


def open_sweep_run(
    uri: str, experiment: str, identity: RunIdentity, *, params: Mapping[str, Any] | None = None
) -> TrackingRef | None:
    """The run above all pipeline runs of a sweep, continued if there is one. identity.run: the sweep's name. None when
    MLflow cannot be reached."""
    marks = {"radlads.sweep": identity.run, "radlads.store_id": identity.store, "radlads.kind": "sweep"}
    return _open(uri, experiment, identity.run, marks, marks, params, True)


def nest_run(parent: TrackingRef, child: TrackingRef) -> bool:
    """Make one MLflow run the parent of another; returns whether it is. An outage is no error."""
    with outage_is_no_error(parent.uri):
        client = connect(parent.uri)
        if client.get_run(child.run_id).data.tags.get("mlflow.parentRunId") != parent.run_id:
            client.set_tag(child.run_id, "mlflow.parentRunId", parent.run_id)
        return True
    return False


def close_run(ref: TrackingRef | None, status: Ending) -> bool:
    """End a run; returns whether MLflow was updated. An outage is no error."""
    if ref is None or is_wandb(ref.uri):
        return True
    with outage_is_no_error(ref.uri):
        connect(ref.uri).set_terminated(ref.run_id, status)
        return True
    return False


def settle_run(ref: TrackingRef, status: Ending, ended: datetime | None = None) -> bool:
    """Set a run's final status in MLflow if it has none; returns whether it has one. An outage is no error."""
    with outage_is_no_error(ref.uri):
        client = connect(ref.uri)
        if client.get_run(ref.run_id).info.status != status:
            at = None if ended is None else int(ended.timestamp() * 1000)
            client.set_terminated(ref.run_id, status, at)
        return True
    return False


def retag_run(uri: str, run_id: str, digest: str) -> bool:
    """Change the digest in the tags of a stage's MLflow run; returns whether it is changed. An outage is no error."""
    with outage_is_no_error(uri):
        connect(uri).set_tag(run_id, "radlads.digest", digest)
        return True
    return False


def log_file(ref: TrackingRef | None, name: str, data: bytes) -> None:
    """Add a small file (a picture, a report) to a run. An outage is no error."""
    if ref is not None and not is_wandb(ref.uri):
        with outage_is_no_error(ref.uri), tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            connect(ref.uri).log_artifact(ref.run_id, str(path))


def run_url(ref: TrackingRef | None) -> str | None:
    """The address of the run's page; None without a server."""
    if ref is None or not ref.uri.startswith("http"):
        return None
    return f"{ref.uri.rstrip('/')}/#/experiments/{_experiment_id(connect(ref.uri), ref)}/runs/{ref.run_id}"


def add_params(ref: TrackingRef, params: Mapping[str, Any]) -> bool:
    """Add params to a run; existing ones are not changed. Returns whether it has them. An outage is no error."""
    with outage_is_no_error(ref.uri):
        _add_params(connect(ref.uri), ref.run_id, params)
        return True
    return False


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _open(
    uri: str,
    experiment: str,
    name: str,
    identity: Mapping[str, str],
    tags: Mapping[str, str],
    params: Mapping[str, Any] | None,
    running: bool,
) -> TrackingRef | None:
    with outage_is_no_error(uri):
        client = connect(uri)
        experiment_id = _find_experiment(client, uri, experiment)
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
        found = client.search_runs(
            [experiment_id], filter_string=query, max_results=1, order_by=["attributes.start_time"]
        )
        if found:
            run_id = str(found[0].info.run_id)
            renamed = name if found[0].info.run_name != name else None  # an earlier version named stages otherwise
            if running or renamed:
                client.update_run(run_id, status="RUNNING" if running else None, name=renamed)
        else:
            run_id = str(client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id)
        _add_params(client, run_id, params or {})
        return TrackingRef(uri=uri, experiment=experiment, run_id=run_id)
    return None


def _find_experiment(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    place = None
    if uri.startswith("sqlite:"):
        # Without a server, MLflow would write pictures and reports to the working directory.
        place = f"{Path(uri.removeprefix('sqlite:///')).parent}/mlflow-artifacts/{name}"
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run created it concurrently
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _experiment_id(client: MlflowClient, ref: TrackingRef) -> str:
    with outage_is_no_error(ref.uri):
        return str(client.get_run(ref.run_id).info.experiment_id)
    return "0"


def _add_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """MLflow rejects a changed param, so only new ones are written."""
    from mlflow.entities import Param

    if not params:
        return
    known = client.get_run(run_id).data.params
    fresh = [
        Param(key, str(value)[:_LONGEST_PARAM])
        for key, value in flatten(params).items()
        if value is not None and key not in known
    ]
    for start in range(0, len(fresh), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=fresh[start : start + _PARAMS_PER_BATCH])


def metric_name(text: str) -> str:
    """A name that MLflow accepts."""
    return re.sub(r"[^\w./ -]", "_", text)


@contextmanager
def outage_is_no_error(uri: str) -> Iterator[None]:
    """Catches the errors of MLflow, requests and SQLAlchemy; none of them may stop a training run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an optional mirror must not fail the run
        if uri not in _reported:
            _log.warning("MLflow at %s: %s; continuing without it", uri, hide(" ".join(str(error).split()))[:300])
        _reported.add(uri)
    else:
        _reported.discard(uri)
