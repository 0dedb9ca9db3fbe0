"""Finds what goes wrong in training: pure functions of the record so far, so a repeated run decides as the first did.

A row has `step`, `loss`, `grad_norm`, `tokens_per_second`, and where they apply `phase` and `ce_spike`. Steps are
compared with earlier ones of the same phase; a step with a CE spike has another loss and is neither judged nor
compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from radlads.tasks.contracts.events import Event, EventKind, Row
from radlads.tasks.contracts.recipe.watch import Outlier, Plateau, Throughput, Watch

_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median distance from the median."""
_USUAL_WINDOWS = 8
"""Windows of steps, before the last one, that tell the usual throughput."""


def judge(watch: Watch, rows: Sequence[Row], events: Sequence[Event]) -> list[Event]:
    """What the newest row shows about the training, each finding with its detector's action.

    rows: the newest rows in order, at least `rows_needed`. events: all on record.
    """
    last = rows[-1]
    if last.get("ce_spike"):
        return []
    alike = [row for row in rows if row.get("phase") == last.get("phase") and not row.get("ce_spike")]
    since, events = since_rollback(events)
    found = (
        _outlier("loss_spike", "loss", watch.loss_spike, alike),
        _outlier("gradient_explosion", "grad_norm", watch.gradient_explosion, alike),
        _plateau(watch.plateau, [row for row in alike if row["step"] > since]),
    )
    return [event for event in found if event is not None and not _is_fresh(event, events)]


def judge_throughput(detector: Throughput, rows: Sequence[Row], events: Sequence[Event], *, began: int) -> list[Event]:
    """The same of the throughput. Only steps after `began` are judged: another attempt may have another machine."""
    window, phase = detector.window, rows[-1].get("phase")
    alike = [row for row in rows if row.get("phase") == phase][-(_USUAL_WINDOWS + 1) * window :]
    usual, now = alike[:-window], alike[-window:]
    if detector.policy == "off" or len(usual) < window or now[0]["step"] <= began:
        return []
    median, value = (float(np.median([row["tokens_per_second"] for row in part])) for part in (usual, now))
    if value >= detector.share * median:
        return []
    event = Event(
        kind="throughput", step=now[-1]["step"], first=now[0]["step"], action=detector.policy,
        number="tokens_per_second", value=value, threshold=detector.share * median, median=median, steps=len(alike),
    )  # fmt: skip
    return [] if _is_fresh(event, events) else [event]


def rows_needed(watch: Watch) -> int:
    """Rows that the detectors may look at, at least 1. Up to every second one has a CE spike and is left out."""
    spike, explosion = watch.loss_spike, watch.gradient_explosion
    lengths = (
        (spike.policy, 2 * (spike.window + spike.patience)),
        (explosion.policy, 2 * (explosion.window + explosion.patience)),
        (watch.plateau.policy, 2 * watch.plateau.window),
        (watch.throughput.policy, (_USUAL_WINDOWS + 1) * watch.throughput.window),
    )
    return max((rows for policy, rows in lengths if policy != "off"), default=1)


def since_rollback(events: Sequence[Event]) -> tuple[int, Sequence[Event]]:
    """The step that the last rollback went back to (0: none), and the events after it."""
    last = max((i for i, event in enumerate(events) if event.action == "rollback"), default=None)
    return (0, events) if last is None else (events[last].to or 0, events[last + 1 :])


def _is_fresh(event: Event, events: Sequence[Event]) -> bool:
    """Whether the same was reported on steps that were now looked at again."""
    return event.action == "report" and any(
        one.kind == event.kind and one.action == "report" and event.step - one.step < event.steps for one in events
    )


def _outlier(kind: EventKind, number: str, detector: Outlier, rows: Sequence[Row]) -> Event | None:
    window, patience = detector.window, detector.patience
    if detector.policy == "off" or len(rows) < window + patience:
        return None
    newest = rows[-patience:]
    before = np.array([row[number] for row in rows[-patience - window : -patience]])
    median = float(np.median(before))
    spread = _NORMAL * float(np.median(np.abs(before - median)))
    threshold = max(median + detector.z * spread, detector.ratio * median)
    if min(row[number] for row in newest) <= threshold:
        return None
    return Event(
        kind=kind, step=newest[-1]["step"], first=newest[0]["step"], action=detector.policy, number=number,
        value=newest[-1][number], threshold=threshold, median=median, spread=spread, steps=window + patience,
    )  # fmt: skip


def _plateau(detector: Plateau, rows: Sequence[Row]) -> Event | None:
    window = detector.window
    if detector.policy == "off" or len(rows) < window:
        return None
    newest = rows[-window:]
    losses = np.array([row["loss"] for row in newest])
    earlier, later = float(np.median(losses[: window // 2])), float(np.median(losses[window // 2 :]))
    threshold = (1 - detector.improvement) * earlier
    if later <= threshold:
        return None
    return Event(
        kind="plateau", step=newest[-1]["step"], first=newest[0]["step"], action=detector.policy, number="loss",
        value=later, threshold=threshold, median=earlier, steps=window,
    )  # fmt: skip
