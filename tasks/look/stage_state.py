"""The state of one stage of a run, from the store: its pointer, its product's manifest, lease, note and record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.locks.lease import EXPIRY_SECONDS, LeaseSheet, held_by
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.layout import lease_key
from radlads.tasks.contracts.store.pointers import Pointer
from radlads.tasks.launchers.progress import Watcher
from radlads.tasks.look.note import ProgressNote, read_note

StageWord = Literal["to do", "running", "starting", "waiting", "done", "outdated", "stopped", "failed", "died", "begun"]
_LONGEST_REASON = 240
_LOSSES = ("loss", "heldout/loss")


@dataclass(frozen=True)
class Pulse:
    """A lease that was not released. age: seconds since its last heartbeat, by the store's clock; None if unknown."""

    lease: LeaseSheet
    age: float | None

    @property
    def is_alive(self) -> bool:
        """Whether its holder may be at work: not known to be dead, and not silent for too long."""
        holder = self.lease.holder
        return holder.is_alive if holder.is_here else self.age is None or self.age < EXPIRY_SECONDS


@dataclass
class StageState:
    """A stage of a run. product: its key, "" before it has one. seconds, gpu_hours, dollars: that its job has taken so
    far, if this run made it. made_by: another run that made it, or makes it. done, total: in `unit`s. reason: why it
    ended. planned_seconds: of all of it, by the plan. seconds_left: by its speed now, else by the plan."""

    label: str
    stage: str
    word: StageWord
    product: str = ""
    begun: datetime | None = None
    done: float | None = None
    total: float | None = None
    unit: str = ""
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    gpu_hours: float | None = None
    dollars: float | None = None
    made_by: str = ""
    where: str = ""
    last_seen_seconds: float | None = None
    reason: str = ""
    events: tuple[str, ...] = ()
    planned_seconds: float | None = None
    made_from: tuple[str, ...] = ()
    """Digests of what a finished one has read."""

    @property
    def share(self) -> float | None:
        """Done of total, from 0 to 1."""
        return min(1.0, self.done / self.total) if self.done is not None and self.total else None


def pulse_of(store: Store, prefix: str) -> Pulse | None:
    """The unreleased lease on a run or a product; None if nothing holds it. Raises StoreError."""
    lease = held_by(store, prefix)
    return None if lease is None else Pulse(lease, store.age(lease_key(prefix)))


def stage_state(
    store: Store, run: str, label: str, stage: str, pointer: Pointer | None, planned: Mapping[str, Any], alive: bool
) -> StageState:
    """The state of a stage. planned: the plan's numbers for it. alive: whether the run is at work.
    Raises StoreError."""
    state = StageState(label, stage, "to do", planned_seconds=planned.get("seconds"))
    if pointer is None:
        state.seconds_left = state.planned_seconds
        return state
    state.product, state.begun = pointer.key, pointer.time
    manifest = store.read_manifest(pointer.key)
    note = read_note(store, pointer.key)
    if manifest is not None:
        _is_done(state, run, manifest, note)
        return state
    pulse = pulse_of(store, pointer.key)
    current = note is not None and (pulse is None or note.token == pulse.lease.token)
    if note is not None:
        _has_come(state, note)
    if pulse is not None and pulse.is_alive:
        state.where, state.last_seen_seconds = str(pulse.lease.holder), pulse.age
        if pulse.lease.run != run:
            state.made_by = pulse.lease.run
            state.word = "waiting" if alive else "begun"
        else:
            if pulse.lease.holder.is_here:
                current |= _has_come_here(state, Path(pulse.lease.holder.work))
            state.word = "running" if current and state.done is not None else "starting"
    elif pulse is not None:
        state.word, state.where, state.last_seen_seconds = "died", str(pulse.lease.holder), pulse.age
    else:
        _has_ended(state, store)
    if state.word not in ("running", "starting", "waiting") or state.seconds_left is None:
        state.seconds_left = _by_the_plan(state)
    return state


def _is_done(state: StageState, run: str, manifest: Manifest, note: ProgressNote | None) -> None:
    state.word, state.made_from = "done", tuple(ref.digest for ref in manifest.inputs.values())
    metrics = manifest.metrics
    steps = metrics.get("steps")
    if isinstance(steps, int | float):
        state.done, state.total, state.unit = float(steps), float(steps), "steps"
    state.loss = next((_number(metrics[name]) for name in _LOSSES if name in metrics), None)
    state.tokens_per_second = _number(metrics.get("tokens_per_second"))
    if manifest.run and manifest.run != run:
        state.made_by = manifest.run
        return
    state.seconds = note.seconds if note is not None else _number(metrics.get("seconds"))
    if note is not None and note.device == "cuda":
        state.gpu_hours, state.dollars = note.gpu_hours, note.dollars
    elif note is None and metrics.get("gpu_hours"):
        state.gpu_hours, state.dollars = _number(metrics["gpu_hours"]), _number(metrics.get("dollars"))


def _has_come(state: StageState, note: ProgressNote) -> None:
    """How far an unfinished stage is, by its note."""
    state.done, state.total, state.unit = note.done, note.total, note.unit
    state.seconds, state.events = note.seconds, note.events
    state.loss = next((note.metrics[name] for name in _LOSSES if name in note.metrics), None)
    state.tokens_per_second = note.metrics.get("tokens_per_second")
    state.seconds_left = note.seconds_left
    if note.device == "cuda":
        state.gpu_hours, state.dollars = note.gpu_hours, note.dollars


def _has_come_here(state: StageState, scratch: Path) -> bool:
    """The same by the files of a job that is followed on this machine, which are newer; whether it has them."""
    watcher = Watcher(scratch, None)
    try:
        watcher.look()
    except (OSError, ValueError, KeyError, TypeError):  # another user's, or of another version
        return False
    if watcher.last is None:
        return False
    metrics = watcher.last.metrics
    state.done, state.total, state.unit = watcher.last.done, watcher.last.total, watcher.last.unit
    state.loss = next((metrics[name] for name in _LOSSES if name in metrics), state.loss)
    state.tokens_per_second = metrics.get("tokens_per_second", state.tokens_per_second)
    state.events = watcher.last.events
    return True


def _has_ended(state: StageState, store: Store) -> None:
    """Nobody makes it now: how its last job ended."""
    ending: dict[str, Any] = {}
    with suppress(ValueError, TypeError):  # half written, or of another version
        ending = dict(json.loads(store.get_bytes(f"{state.product}/job/exit.json") or "{}"))
    reason = str(ending.get("reason", ""))
    if reason == "preempted":
        state.word = "stopped"
    elif reason and reason != "done":
        state.word = "failed"
        state.reason = one_line(str(ending.get("message") or reason), _LONGEST_REASON)
    else:
        state.word = "begun"


def _by_the_plan(state: StageState) -> float | None:
    return None if state.planned_seconds is None else state.planned_seconds * (1.0 - (state.share or 0.0))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
