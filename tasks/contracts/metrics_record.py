"""metrics.jsonl, the record of a job's numbers, and its mirror in MLflow.

A row is written and flushed at once. A separate thread reads the file and sends rows that MLflow does not have yet.
MLflow itself is queried for the last step of each metric, so any later process can continue from there, and no step of
a metric is sent twice. The steps that a rollback repeats are sent under names of their own (`rollback-1/loss`). Losses
are sent twice, under their names by the optimizer step, which logs and checkpoints count, and as `by_tokens/<name>` by
the tokens seen, which alone compares runs whose batches or contexts differ.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from radlads.tasks.contracts.events import Event, Repeats, events_of, kept_rows
from radlads.tasks.contracts.job import TrackingRef
from radlads.tasks.contracts.mirrors.record_file import (
    NOT_METRICS,
    TokenAxis,
    finite,
    named,
    notes_path,
    parse_rows,
    read_from,
    read_notes,
    replace_file,
)
from radlads.tasks.contracts.mirrors.weights_biases import WandbMirror, is_wandb
from radlads.tasks.contracts.parsing.credentials import hide, with_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_log = logging.getLogger(__name__)
_METRICS_PER_BATCH = 1000
_FLUSH_SECONDS = 2.0
_LONGEST_WAIT_SECONDS = 60.0


def connect(uri: str) -> MlflowClient:
    """An MLflow client with timeouts of seconds instead of minutes, and without telemetry. uri: without user and
    password, which this process keeps in memory."""
    from mlflow import MlflowClient, environment_variables
    from mlflow.telemetry.client import set_telemetry_client

    for setting, value in (
        (environment_variables.MLFLOW_DISABLE_TELEMETRY, True),
        (environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT, 10),
        (environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 1),
        (environment_variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),  # with the password in it
    ):
        if not setting.is_set():  # type: ignore[no-untyped-call]
            setting.set(value)  # type: ignore[no-untyped-call]
    set_telemetry_client()  # type: ignore[no-untyped-call] # again: at import the setting was missing
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if uri.startswith(_SQLITE):
        Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=with_credentials(uri))


def latest_metrics(client: MlflowClient, run_id: str) -> dict[str, tuple[int, float]]:
    """Metric → its last step that MLflow has, and the value there."""
    data = client.get_run(run_id).data
    return {metric.key: (int(metric.step), float(metric.value)) for metric in data.to_proto().metrics}


class MetricsRecord:
    """The numbers of one job: written to a file at once, sent to MLflow when it is reachable. Never blocks on MLflow.

    path: metrics.jsonl; an incomplete last line (after kill -9) is removed. ref: the MLflow run, or None for no mirror.
    """

    def __init__(self, path: Path, ref: TrackingRef | None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._stream: TextIO | None = None
        self._last_step: dict[str, int] = {}
        self._rewrite(lambda rows: rows)
        self._mirror = _mirror_of(path, ref, self._lock) if ref is not None else None
        if self._mirror is not None:
            self._mirror.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row. step: the optimizer step, never smaller than an earlier one of the same metric; a metric
        already recorded for this step is not changed. Values that are not finite are written as null."""
        fresh = {key: finite(value) for key, value in metrics.items() if step > self._last_step.get(key, -1)}
        if not fresh:
            return
        self._write(step, fresh)
        self._last_step |= dict.fromkeys(fresh, step)

    def event(self, event: Event) -> None:
        """Write an event as a row."""
        self._write(event.step, {"event": event.model_dump(mode="json")})

    def rewind(self, step: int) -> None:
        """Delete the rows after `step`, to which the job was restored. Events that led there stay."""
        self._rewrite(lambda rows: kept_rows(rows, step))
        if self._mirror is not None:
            self._mirror.reread()

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far."""
        return parse_rows(self.path.read_bytes())[0]

    def params(self, params: Mapping[str, Any]) -> None:
        """Add params to the MLflow run; existing ones are not changed."""
        self._note("params", {key: str(value) for key, value in params.items()})

    def artifact(self, path: Path) -> None:
        """Add a small file (a picture, a report) to the MLflow run."""
        self._note("artifacts", {str(path): 1})

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Let the mirror catch up, for at most this long, then close the record."""
        if self._mirror is not None:
            self._mirror.stop(timeout_seconds)
            self._mirror = None
        if self._stream is not None:
            try:
                self._stream.close()
            except OSError as error:  # the disk was full, which the writer has reported already
                _log.warning("the end of %s was not written: %s", self.path, error)
            self._stream = None

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": step, "time": time.time_ns() // 1_000_000, **values}
        with self._lock:
            assert self._stream is not None, "the record is closed"
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()

    def _note(self, kind: str, values: dict[str, Any]) -> None:
        with self._lock:
            notes = read_notes(self.path)
            notes.setdefault(kind, {}).update(values)
            replace_file(notes_path(self.path), json.dumps(notes).encode())

    def _rewrite(self, keep: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.close()
            if self.path.exists():
                rows = keep(parse_rows(self.path.read_bytes())[0])
                replace_file(self.path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            else:
                rows = []
            self._last_step = {key: row["step"] for row in rows for key in row if key not in NOT_METRICS}
            self._stream = self.path.open("a", encoding="utf-8")


def catch_up(path: Path, ref: TrackingRef) -> bool:
    """Send MLflow the missing rows of a record that is complete; returns whether that succeeded. W&B keeps them
    itself."""
    if is_wandb(ref.uri) or (not path.exists() and not notes_path(path).exists()):
        return True
    return _Mirror(path, ref, threading.Lock()).try_once()


def _mirror_of(path: Path, ref: TrackingRef, lock: threading.Lock) -> _Mirror | WandbMirror:
    return WandbMirror(path, ref, lock) if is_wandb(ref.uri) else _Mirror(path, ref, lock)


class _Mirror(threading.Thread):
    """Follows the file and sends new rows in batches; after an outage it continues where it stopped."""

    def __init__(self, path: Path, ref: TrackingRef, lock: threading.Lock) -> None:
        super().__init__(name="mlflow-mirror", daemon=True)
        self._path, self._ref, self._lock = path, ref, lock
        self._offset = 0
        self._generation = 0
        self._sent: dict[str, int] | None = None
        self._repeats = Repeats()
        self._tokens = TokenAxis()
        self._events: list[Event] = []
        self._events_sent: list[Event] = []
        self._notes_sent: dict[str, Any] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._failing = False

    def run(self) -> None:
        wait = _FLUSH_SECONDS
        while True:
            stopping = self._stopping  # read before sending, so that all rows written before stop() are sent
            wait = _FLUSH_SECONDS if self.try_once() else min(2 * wait, _LONGEST_WAIT_SECONDS)
            if stopping:
                return
            self._wake.wait(wait)

    def reread(self) -> None:
        """The file was rewritten: read it from the start, skipping rows that were sent."""
        with self._lock:
            self._offset, self._repeats, self._tokens, self._events = 0, Repeats(), TokenAxis(), []
            self._generation += 1

    def stop(self, timeout_seconds: float) -> None:
        self._stopping = True
        self._wake.set()
        self.join(timeout_seconds)

    def try_once(self) -> bool:
        """Send all new rows; returns whether all arrived."""
        try:
            self._send()
        except Exception as error:  # noqa: BLE001 - an optional mirror must not fail the job
            if not self._failing:
                _log.warning(
                    "MLflow at %s: %s; the record is %s, MLflow is updated later",
                    self._ref.uri, hide(" ".join(str(error).split()))[:300], self._path,
                )  # fmt: skip
            self._failing = True
            self._sent = None  # some rows may have arrived: query again
            return False
        self._failing = False
        return True

    def _send(self) -> None:
        from mlflow.entities import Metric

        client = connect(self._ref.uri)
        if self._sent is None:
            self._sent = {key: step for key, (step, _) in latest_metrics(client, self._ref.run_id).items()}
        while True:
            with self._lock:
                generation, repeats, events = self._generation, copy(self._repeats), self._events
                tokens = copy(self._tokens)
                data = read_from(self._path, self._offset)
            rows, used = parse_rows(data)
            if not used:
                break
            metrics = [
                Metric(key, value, row["time"], step)
                for row in rows
                for key, value, step in named(row, repeats.prefix(row), tokens.at(row))
                if value is not None and step > self._sent.get(key, -1)
            ]
            sent = dict(self._sent)
            for metric in metrics:
                sent[metric.key] = max(metric.step, sent.get(metric.key, -1))
            for first in range(0, len(metrics), _METRICS_PER_BATCH):
                client.log_batch(self._ref.run_id, metrics=metrics[first : first + _METRICS_PER_BATCH])
            self._sent = sent
            with self._lock:
                if self._generation == generation:
                    self._offset += used
                    self._repeats, self._tokens, self._events = repeats, tokens, events + events_of(rows)
        self._send_events(client)
        self._send_notes(client)

    def _send_events(self, client: MlflowClient) -> None:
        """All events as the artifact events.json, and the last one as a tag."""
        events = self._events
        if events == self._events_sent:
            return
        client.log_dict(self._ref.run_id, {"events": [one.model_dump(mode="json") for one in events]}, "events.json")
        last = f"{events[-1].finding}; {events[-1].done}" if events else ""
        client.set_tag(self._ref.run_id, "radlads.events", f"{len(events)}: {last}")
        self._events_sent = events

    def _send_notes(self, client: MlflowClient) -> None:
        from mlflow.entities import Param

        with self._lock:
            notes = read_notes(self._path)
        if notes == self._notes_sent:
            return
        known = client.get_run(self._ref.run_id).data.params
        fresh = [Param(key, value) for key, value in notes.get("params", {}).items() if key not in known]
        for first in range(0, len(fresh), 100):
            client.log_batch(self._ref.run_id, params=fresh[first : first + 100])
        for path in notes.get("artifacts", {}):
            if path not in self._notes_sent.get("artifacts", {}) and os.path.exists(path):
                client.log_artifact(self._ref.run_id, path)
        self._notes_sent = notes
