"""The watch of a training job: judges every step, puts what it finds on record, and stops the job or rolls it back.

Every rank has one, and all decide alike without talking to each other: they judge numbers that the ranks have agreed
on, and the record, which the first rank shares when a job begins and after a rollback. The throughput is no such
number: the first rank alone judges it, and a stop for it is passed on like a request to stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import distributed

from radlads.tasks.contracts.events import Event, Row, events_of
from radlads.tasks.contracts.recipe.watch import Watch
from radlads.tasks.jobs.checkpoints.checkpoint import Checkpoints
from radlads.tasks.jobs.common import Job, NoRecord
from radlads.tasks.jobs.exit_reasons import StoppedByWatch
from radlads.tasks.jobs.watch.detectors import judge, judge_throughput, rows_needed, since_rollback

_JUDGED = ("step", "loss", "grad_norm", "tokens_per_second", "phase", "ce_spike")


class Watchdog:
    """Made after the record was rewound to the step where the job goes on. Collective."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self.job, self.watch = job, watch
        self.slow: Event | None = None
        """A loss of throughput for which the job must stop. Of the first rank only."""
        self._read_record()
        self._began = self._rows[-1]["step"] if self._rows else 0
        for event in self.events:
            job.shown.announce(_line(event), new=False)

    @property
    def rollbacks(self) -> tuple[int, ...]:
        """The steps that were gone back to, in the order of time."""
        return tuple(event.to for event in self.events if event.to is not None)

    def see(self, step: int, row: Mapping[str, float], *, is_last: bool = False) -> Event | None:
        """Judge a step that is on record. Returns what must be acted on before the next step. is_last: of the stage;
        the throughput, for which only the next step could stop the job, is not judged any more."""
        self._rows.append({name: value for name, value in {"step": step, **row}.items() if name in _JUDGED})
        if self.job.rank == 0 and self.slow is None and not is_last:
            for event in judge_throughput(self.watch.throughput, self._rows, self.events, began=self._began):
                self.slow = event if event.action == "stop" else self.slow
                self._note(event)
        return self.judge()

    def judge(self) -> Event | None:
        """Judge the newest step on record; see `see`."""
        if not self._rows:
            return None
        found = judge(self.watch, self._rows, self.events)
        urgent = max(found, key=lambda event: (event.action != "report", event.action == "stop"), default=None)
        for event in found:
            if event is not urgent or event.action == "report":
                self._note(event.model_copy(update={"action": "report"}))
        return None if urgent is None or urgent.action == "report" else urgent

    def not_finite(self, step: int) -> Event | None:
        """What must be acted on after a step that raised NonFiniteError; None where that error must end the job."""
        event = Event(kind="nonfinite", step=step, first=step, action=self.watch.nonfinite.policy, number="loss")
        if event.action == "rollback":
            return event
        self._note(event)
        return None

    def act(self, event: Event, checkpoints: Checkpoints) -> int:
        """Roll back; returns the step to go on from. Raises StoppedByWatch, after a checkpoint if the parameters are
        those of the step. Collective."""
        why = "its policy is `stop`"
        if event.action == "rollback":
            checkpoints.wait()
            target = None if self._is_exhausted else checkpoints.find(self._latest_good(event))
            if target is not None:
                self._note(event.model_copy(update={"to": target, "seconds": self._seconds_after(target)}))
                checkpoints.discard_after(target)  # before the record is rewound: it tells which they are
                self.job.record.rewind(target)
                checkpoints.load(target)
                self._read_record()
                return target
            why = "no checkpoint from before it is left"
            if self._is_exhausted:
                why = f"the job was rolled back {len(self.rollbacks)} times already (watch.rollback.max_rollbacks)"
        self._note(event.model_copy(update={"action": "stop"}))
        if event.kind != "nonfinite":
            checkpoints.save(event.step)
            checkpoints.wait()
        self.job.barrier()  # the launcher ends every rank as soon as one has exited
        raise stopped(event, why)

    @property
    def _is_exhausted(self) -> bool:
        return len(self.rollbacks) >= self.watch.rollback.max_rollbacks

    def _latest_good(self, event: Event) -> int:
        """The last step at which a checkpoint is good for a rollback. The loss of a step tells of the parameters before
        it, so the step after a good checkpoint was in order; where an earlier rollback went back to, it had been. A
        step with a CE spike was not judged, except for being finite."""
        proven = [step for step in self.rollbacks[-1:] if step < event.first]
        spiked = {row["step"] for row in self._rows if row.get("ce_spike")} if event.kind != "nonfinite" else ()
        in_order = next(step for step in range(event.first - 1, -2, -1) if step not in spiked)
        return max([in_order - 1, *proven])

    def _note(self, event: Event) -> None:
        """Put an event on record, unless it was before the job ended at this very step."""
        _, events = since_rollback(self.events)
        if any((one.kind, one.step, one.action) == (event.kind, event.step, event.action) for one in events):
            return
        self.events.append(event)
        self.job.record.event(event)
        self.job.shown.announce(_line(event))

    def _seconds_after(self, step: int) -> float:
        """Of the steps on record after `step`; 0 on all ranks but the first."""
        record = self.job.record
        rows = [] if isinstance(record, NoRecord) else record.rows()
        return sum(row.get("seconds") or 0.0 for row in rows if row["step"] > step)

    def _read_record(self) -> None:
        """Take the newest rows and all events from the record of the first rank."""
        record, needed = self.job.record, rows_needed(self.watch)
        shared: list[Any] = [None]
        if not isinstance(record, NoRecord):
            rows = record.rows()
            steps = [{name: row[name] for name in _JUDGED if name in row} for row in rows if "loss" in row]
            shared = [(steps[-needed:], [event.model_dump(mode="json") for event in events_of(rows)])]
        if self.job.world_size > 1:
            distributed.broadcast_object_list(shared, src=0, device=self.job.device)
        rows, events = shared[0]
        self._rows: deque[Row] = deque(rows, maxlen=needed)
        self.events = [Event.model_validate(event) for event in events]


def stopped(event: Event, why: str) -> StoppedByWatch:
    """The error that ends a job for an event, with what to do."""
    if event.kind == "nonfinite":
        remedy = "lower the learning rate, or look at the data of this step"
    elif event.kind == "throughput":
        remedy = "look at the machine, then start the run again: it goes on from there"
    elif event.action == "rollback":
        remedy = "raise watch.rollback.max_rollbacks to go on from there, or change the training"
    else:
        remedy = f"set watch.{event.kind}.policy to report to go on from there, or change the training"
    saved = "" if event.kind == "nonfinite" else f"; step {event.step} is saved"
    return StoppedByWatch(f"{event.finding}. Stopped, because {why}{saved}; {remedy}")


def _line(event: Event) -> str:
    return f"{event.finding}; {event.done}"
