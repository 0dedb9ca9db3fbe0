"""Weights & Biases in place of MLflow: `tracking: wandb:PROJECT` or `wandb:ENTITY/PROJECT`, with its own variables
(WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL).

The same record feeds it. A run of the pipeline is a group; each stage is a run of it, `RUN / stage`, with an id that
follows from its product, so every process continues the same one. Rows are numbered by the milliseconds since the
record began: W&B takes no number twice, so rows that are sent again are ignored. W&B keeps what it cannot send in a
folder, for `wandb sync`. The package is optional, and no fault of it fails a job.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.events import Repeats
from radlads.tasks.contracts.job import TrackingRef
from radlads.tasks.contracts.mirrors.record_file import TokenAxis, named, parse_rows, read_from
from radlads.tasks.contracts.parsing.credentials import hide

PREFIX = "wandb:"
_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0
_INIT_SECONDS = 30.0
_opening = threading.Lock()
_reported: set[str] = set()


def is_wandb(uri: str) -> bool:
    """Whether a tracking address means Weights & Biases."""
    return uri.startswith(PREFIX)


def wandb_ref(uri: str, folder: str, experiment: str, name: str, *identity: str) -> TrackingRef:
    """A run of W&B; nothing is asked of its server. folder: of its files. identity: what the id is made of."""
    run_id = hashlib.sha256("/".join((uri, *identity)).encode()).hexdigest()[:16]
    return TrackingRef(uri=uri, experiment=experiment, run_id=run_id, name=name, folder=folder)


@contextmanager
def open_wandb(ref: TrackingRef, config: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """A run of W&B, continued if there is one; ended with the block. Raises what wandb raises."""
    run = _init(ref, config)
    try:
        yield run
    finally:
        run.finish()


@contextmanager
def wandb_is_optional(ref: TrackingRef) -> Iterator[None]:
    """Catches and reports, once, every error of W&B."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an optional mirror must not fail the run
        if ref.uri not in _reported:
            _log.warning("%s: %s; continuing without it", ref.uri, hide(" ".join(str(error).split()))[:300])
        _reported.add(ref.uri)


def _init(ref: TrackingRef, config: Mapping[str, Any] | None) -> Any:
    import wandb

    entity, _, project = ref.uri.removeprefix(PREFIX).rpartition("/")
    Path(ref.folder).mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, save_code=False, init_timeout=_INIT_SECONDS
    )
    group, _, stage = ref.name.partition(" / ")
    with _opening:
        run = wandb.init(
            entity=entity or None,
            project=project,
            dir=ref.folder,
            id=ref.run_id,
            name=ref.name,
            group=group,
            job_type=stage.partition(" ")[0] or "pipeline",
            tags=[ref.experiment[:64]],
            config=dict(config or {}),
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
    run.define_metric("step")
    run.define_metric("tokens")
    run.define_metric("*", step_metric="step")
    run.define_metric("by_tokens/*", step_metric="tokens")
    return run


class WandbMirror(threading.Thread):
    """Follows a record and logs its rows, as _Mirror of metrics_record does for MLflow."""

    def __init__(self, path: Path, ref: TrackingRef, lock: threading.Lock) -> None:
        super().__init__(name="wandb-mirror", daemon=True)
        self._path, self._ref, self._lock = path, ref, lock
        self._offset, self._began = 0, 0
        self._repeats, self._tokens = Repeats(), TokenAxis()
        self._wake = threading.Event()
        self._stopping = False

    def run(self) -> None:
        """Until stopped; an error ends it."""
        with wandb_is_optional(self._ref), open_wandb(self._ref) as run:
            while True:
                stopping = self._stopping  # read before sending, so that all rows written before stop() are sent
                self.send(run)
                if stopping:
                    return
                self._wake.wait(_LOOK_SECONDS)

    def send(self, run: Any) -> None:
        """Log all new rows."""
        while True:
            with self._lock:
                data, offset = read_from(self._path, self._offset), self._offset
                repeats, tokens = copy(self._repeats), copy(self._tokens)
            rows, used = parse_rows(data)
            if not used:
                return
            self._began = self._began or next((row["time"] for row in rows), 0)
            for row in rows:
                seen = tokens.at(row)
                points = {name: value for name, value, _ in named(row, repeats.prefix(row), seen) if value is not None}
                if points:
                    counts = {"step": row["step"]} | ({} if seen is None else {"tokens": seen})
                    run.log(points | counts, step=max(0, row["time"] - self._began))
            with self._lock:
                if self._offset == offset:
                    self._offset, self._repeats, self._tokens = offset + used, repeats, tokens

    def reread(self) -> None:
        """The file was rewritten: read it from the start; W&B ignores what it has."""
        with self._lock:
            self._offset, self._repeats, self._tokens = 0, Repeats(), TokenAxis()

    def stop(self, timeout_seconds: float) -> None:
        """Send the rest, for at most this long."""
        self._stopping = True
        self._wake.set()
        self.join(timeout_seconds)
