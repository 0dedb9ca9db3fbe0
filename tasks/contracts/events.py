"""What the watch of a training job noticed and did. An event is a row of metrics.jsonl, so it is saved in checkpoints,
restored and committed with the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from radlads.tasks.contracts.job import Sheet

EventKind = Literal["nonfinite", "loss_spike", "gradient_explosion", "plateau", "throughput"]
Row = Mapping[str, Any]


class Event(Sheet):
    """A finding, its evidence, and what was done."""

    kind: EventKind
    step: int
    """The optimizer step after which it was noticed."""
    first: int
    """The first step of the evidence."""
    action: Literal["report", "stop", "rollback"]
    to: int | None = None
    """Of a rollback: the step of the checkpoint from which training went on."""
    number: str
    """Which number of the record: loss, grad_norm or tokens_per_second."""
    value: float | None = None
    """None if it was not finite."""
    threshold: float | None = None
    median: float | None = None
    """Of the steps compared with."""
    spread: float | None = None
    """1.4826 · median distance from the median, of the steps compared with."""
    steps: int = 1
    """How many steps were looked at; within so many the same is not reported again."""
    seconds: float = 0.0
    """Of the steps that a rollback gave up."""

    @property
    def finding(self) -> str:
        """What was noticed, with the numbers."""
        name = self.kind.replace("_", " ")
        if self.value is None or self.threshold is None or self.median is None:
            return f"step {self.step}: {name}: the loss or the gradient norm is not finite"
        since = f"since step {self.first}, " if self.first < self.step else ""
        spread = f", spread {self.spread:.3g}" if self.spread is not None else ""
        return (
            f"step {self.step}: {name}: {since}{self.number} {self.value:.4g}, threshold {self.threshold:.4g} "
            f"(median before {self.median:.4g}{spread})"
        )

    @property
    def done(self) -> str:
        """What was done."""
        return {"report": "reported", "stop": "stopped", "rollback": f"rolled back to step {self.to}"}[self.action]


def events_of(rows: Iterable[Row]) -> list[Event]:
    """The events among the rows of a record, in order."""
    return [Event.model_validate(row["event"]) for row in rows if "event" in row]


def rollback_target(row: Row) -> int | None:
    """The step that a row's rollback went back to; None for any other row."""
    target: int | None = row["event"]["to"] if "event" in row else None
    return target


def kept_rows(rows: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The rows that a job keeps when it is restored at `step`: those up to there, and all events that led there.

    Rows are in the order of time, so whatever is before the last rollback to `step`, or to an earlier step, has
    happened; of the rows after it, those beyond `step` will be computed again.
    """
    targets = [rollback_target(row) for row in rows]
    past = max((i for i, target in enumerate(targets) if target is not None and target <= step), default=-1)
    return [row for i, row in enumerate(rows) if row["step"] <= step or ("event" in row and i <= past)]


class Repeats:
    """Tells the steps that a rollback repeats from those that are new. Rows are given in their order."""

    def __init__(self) -> None:
        self.rollbacks = 0
        self._reached = 0

    def prefix(self, row: Row) -> str:
        """What the names of a row's metrics begin with in a curve that already has this step: "rollback-2/"."""
        if rollback_target(row) is not None:
            self.rollbacks += 1
            self._reached = max(self._reached, row["step"])
        return f"rollback-{self.rollbacks}/" if self.rollbacks and row["step"] <= self._reached else ""
