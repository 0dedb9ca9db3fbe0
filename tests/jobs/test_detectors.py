"""The detectors of a training job's watch: what they find in a record, and that they are functions of it alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from radlads.tasks.contracts.events import Event
from radlads.tasks.contracts.recipe.watch import Watch
from radlads.tasks.jobs.watch.detectors import judge, judge_throughput, rows_needed

ALL_REPORT = {name: {"policy": "report"} for name in ("loss_spike", "gradient_explosion", "plateau", "throughput")}


def made(
    losses: Sequence[float], norms: Sequence[float] | None = None, **columns: Sequence[Any]
) -> list[dict[str, Any]]:
    """A record of these losses; a column's None is left out."""
    rows = [
        {"step": i, "loss": float(loss), "grad_norm": float((norms or losses)[i - 1]), "tokens_per_second": 100.0}
        for i, loss in enumerate(losses, 1)
    ]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row |= {} if value is None else {name: value}
    return rows


def found(watch: Watch, rows: list[dict[str, Any]]) -> list[Event]:
    """Everything that is found while the record grows, each judged on the rows that a job keeps in memory."""
    events: list[Event] = []
    for end in range(1, len(rows) + 1):
        kept = rows[:end][-rows_needed(watch) :]
        events += judge(watch, kept, events)
        events += judge_throughput(watch.throughput, kept, events, began=0)
    return events


def noise(count: int, scale: float = 0.01, seed: int = 0) -> np.ndarray:
    return 2.0 + scale * np.random.default_rng(seed).standard_normal(count)


def spiky(**settings: Any) -> Watch:
    off = {name: {"policy": "off"} for name in ALL_REPORT}
    return Watch.model_validate(off | {"loss_spike": {"window": 8, "patience": 1, "ratio": 1, **settings}})


def test_the_defaults_find_nothing_in_ordinary_curves():
    falling = 3 * np.arange(1, 600) ** -0.3 * (1 + 0.05 * np.random.default_rng(1).standard_normal(599))
    assert found(Watch(), made(list(falling))) == []
    assert found(Watch(), made([0.0] * 100)) == []


def test_a_spike_is_what_stands_out_of_median_and_spread():
    losses = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.1]  # median 1, median distance 0.1
    (event,) = found(spiky(z=5), made([*losses, 1.75]))
    assert event.median == 1.0
    assert event.spread == pytest.approx(0.14826)
    assert event.threshold == pytest.approx(1 + 5 * 0.14826)
    assert (event.step, event.first, event.value, event.steps) == (9, 9, 1.75, 9)
    assert found(spiky(z=5), made([*losses, 1.74])) == []
    assert found(spiky(z=5, ratio=1.8), made([*losses, 1.79])) == []
    assert found(spiky(z=5, ratio=1.8), made([*losses, 1.81]))[0].threshold == pytest.approx(1.8)
    assert found(spiky(z=5), made([*losses[1:], 9.0])) == []  # fewer than a window before it


def test_patience_asks_for_steps_in_a_row():
    base = list(noise(20))
    assert found(spiky(patience=3), made([*base, 9, 9, 2, 9, 9])) == []
    (event,) = found(spiky(patience=3), made([*base, 9, 8, 7, 9]))
    assert (event.first, event.step, event.value) == (21, 23, 7.0)


def test_the_gradient_norm_has_its_own_settings():
    norms = [1.0] * 70 + [9.9, 10.1]
    (event,) = found(Watch(), made([2.0] * 72, norms))
    assert (event.kind, event.step, event.number, event.threshold) == ("gradient_explosion", 72, "grad_norm", 10.0)


def test_what_was_reported_is_not_repeated_while_it_is_in_view_and_stops_are_never_held_back():
    losses = [*noise(20), *[9.0] * 3, *noise(10, seed=2), 9.0]
    assert [event.step for event in found(spiky(), made(losses))] == [21, 34]
    stops = found(spiky(policy="stop"), made(losses))
    assert [event.step for event in stops] == [21, 22, 23, 34]


def test_a_phase_is_compared_with_itself():
    losses = [*[2.0] * 20, *[9.0] * 20, 50.0]
    (event,) = found(spiky(), made(losses, phase=[1] * 20 + [2] * 21))
    assert event.step == 41
    assert len(found(spiky(), made(losses))) == 2


def test_ce_spikes_are_neither_judged_nor_compared_with():
    losses = [2.0] * 40
    losses[3::4] = [50.0] * 10
    spikes = [1.0 if i % 4 == 3 else None for i in range(40)]
    assert found(spiky(), made(losses)) != []
    assert found(spiky(), made(losses, ce_spike=spikes)) == []
    (event,) = found(spiky(), made([*losses, 9.0], ce_spike=[*spikes, None]))
    assert (event.median, event.spread) == (2.0, 0.0)


def test_a_plateau_is_less_improvement_than_asked_for():
    watch = Watch.model_validate(ALL_REPORT | {"plateau": {"policy": "report", "window": 8, "improvement": 0.1}})
    falling = [10 * 0.95**i for i in range(30)]  # medians of halves four steps apart: 18.5 %
    assert found(watch, made(falling)) == []
    slow = [10 * 0.98**i for i in range(8)]  # 7.8 %
    (event,) = found(watch, made(slow))
    assert (event.kind, event.first, event.step) == ("plateau", 1, 8)
    assert event.threshold == pytest.approx(0.9 * event.median)
    assert event.value > event.threshold
    assert [event.step for event in found(watch, made([5.0] * 20))] == [8, 16]


def test_after_a_rollback_a_plateau_needs_a_whole_window_of_new_steps():
    watch = Watch.model_validate({"plateau": {"policy": "rollback", "window": 8, "improvement": 0.1}})
    back = Event(kind="plateau", step=12, first=5, action="rollback", to=4, number="loss")
    assert judge(watch, made([5.0] * 11), [back]) == []
    (event,) = judge(watch, made([5.0] * 12), [back])
    assert event.first == 5


def test_throughput_is_the_median_of_a_window_of_this_attempt():
    detector = Watch().throughput.model_copy(update={"window": 4})
    speeds = [100.0] * 10 + [1.0, 100.0, 1.0, 100.0, 100.0, 49.0, 49.0, 49.0]
    rows = made([2.0] * 18, tokens_per_second=speeds)
    assert [judge_throughput(detector, rows[:end], [], began=0) for end in range(1, 18)] == [[]] * 17
    (event,) = judge_throughput(detector, rows, [], began=0)
    assert (event.first, event.step, event.value, event.median, event.threshold) == (15, 18, 49.0, 100.0, 50.0)
    assert judge_throughput(detector, rows, [], began=15) == []
    assert judge_throughput(detector, rows, [event], began=0) == []


def test_what_is_decided_follows_from_the_record_alone():
    """The whole record, read from its file, gives at every step what the rows in memory gave."""
    watch = Watch.model_validate(
        {
            "loss_spike": {"policy": "rollback", "window": 8, "patience": 2, "z": 4, "ratio": 1},
            "gradient_explosion": {"window": 6, "z": 3, "ratio": 1},
            "plateau": {"policy": "stop", "window": 8},
        }
    )
    losses = np.abs(noise(120, scale=0.4, seed=7)) * np.linspace(2, 1, 120)
    losses[81:83] *= 20
    spikes = [1.0 if i % 3 == 2 else None for i in range(120)]
    rows = made(list(losses), ce_spike=spikes, phase=[1] * 50 + [2] * 70)
    read = [json.loads(json.dumps(row)) for row in rows]
    events: list[Event] = []
    for end in range(1, 121):
        decided = judge(watch, rows[:end][-rows_needed(watch) :], events)
        assert judge(watch, read[:end], events) == decided
        events += decided
    assert {event.kind for event in events} == {"loss_spike", "gradient_explosion", "plateau"}
