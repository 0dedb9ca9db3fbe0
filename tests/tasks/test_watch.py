"""`watch` outside the training: its settings and digests, what the record keeps, what Prefect shows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from radlads.tasks import observe
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.events import Event, Repeats, kept_rows
from radlads.tasks.contracts.metrics_record import MetricsRecord
from radlads.tasks.contracts.parsing.document import DocumentError
from radlads.tasks.contracts.recipe.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec, spec_digest
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.sweep.grid import make_members

ROLLING = {"plateau": {"policy": "rollback"}}


def event(step: int, to: int | None = None, kind: Any = "loss_spike") -> Event:
    return Event(
        kind=kind, step=step, first=step, action="report" if to is None else "rollback", to=to, number="loss",
        value=9.0, threshold=3.0, median=2.0, spread=0.1,
    )  # fmt: skip


# Settings and digests


def recipe(**distill: Any) -> Recipe:
    raw = load_recipe("smoke").model_dump(mode="json")
    raw["distill"] |= distill
    return parse_recipe(raw)


def digest(watch: dict[str, Any]) -> str:
    section = recipe(watch=watch).distill
    return spec_digest("distill", TrainSpec(objective="distill", section=section, teacher=FINGERPRINTED), {})


FINGERPRINTED = TeacherRef(path="a", fingerprint="f")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {"loss_spike": {"policy": "stop", "z": 3}, "throughput": {"policy": "off"}}, True),
        ({}, ROLLING, False),
        (ROLLING, {"plateau": {"policy": "rollback", "window": 500}}, False),
        (ROLLING, ROLLING | {"rollback": {"rate_factor": 0.3}}, False),
        (ROLLING, ROLLING | {"rollback": {"ce_spikes": {"every": 10, "weight": 0.1}}}, False),
        (ROLLING, ROLLING | {"nonfinite": {"policy": "rollback"}}, False),
        (ROLLING, ROLLING | {"rollback": {"every": 100}}, False),
        (ROLLING, ROLLING | {"rollback": {"max_rollbacks": 9}}, True),
        (ROLLING, ROLLING | {"loss_spike": {"policy": "stop", "window": 9}, "throughput": {"share": 0.1}}, True),
    ],
)  # fmt: skip
def test_a_digest_has_what_a_rollback_depends_on_and_nothing_else(one, other, same):
    assert (digest(one) == digest(other)) == same


def test_a_digest_of_before_there_was_a_watch_stays():
    section = recipe(decay_dtype="float32").distill  # the default of then
    spec = TrainSpec(objective="distill", section=section, teacher=FINGERPRINTED)
    assert spec_digest("distill", spec, {}) == "8bdf6c7931db0c845f6d26f3037972add9c069fa07702a91efb02c688356d81a"


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"throughput": {"policy": "rollback"}}, "distill.watch.throughput.policy: Input should be 'off', 'report' or"),
        ({"nonfinite": {"policy": "report"}}, "distill.watch.nonfinite.policy: Input should be 'stop' or 'rollback'"),
        ({"spike": {}}, "distill.watch.spike: unknown key 'spike'.*loss_spike"),
        ({"plateau": {"window": 7}}, "distill.watch.plateau.window: Input should be greater than or equal to 8"),
        ({"loss_spike": {"z": 0}}, "distill.watch.loss_spike.z: Input should be greater than 0"),
        ({"throughput": {"share": 1}}, "distill.watch.throughput.share: Input should be less than 1"),
        ({"rollback": {"rate_factor": 0.1}}, "settings of `rollback` are given, but no detector has `policy: rollb"),
        (ROLLING | {"rollback": {"rate_factor": 1, "reshuffle": False}}, "a rollback must change something"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(watch, message):
    with pytest.raises(DocumentError, match=message) as raised:
        recipe(watch=watch)
    assert "\n" not in str(raised.value)


def test_ce_spikes_are_distills_alone_and_suffice_as_a_change():
    only_spikes = {"rate_factor": 1, "reshuffle": False, "ce_spikes": {"every": 10, "weight": 0.1}}
    assert recipe(watch=ROLLING | {"rollback": only_spikes}).distill
    raw = load_recipe("smoke").model_dump(mode="json")
    raw["align"]["watch"] = ROLLING | {"rollback": only_spikes}
    with pytest.raises(DocumentError, match=r"align\.watch\.rollback\.ce_spikes: unknown key 'ce_spikes'"):
        parse_recipe(raw)


def test_rollbacks_slow_every_phase_and_set_its_spikes():
    phases = [
        {"tokens": 512, "mixer_rate": {"start": 1e-3, "final": 1e-4}},
        {"tokens": 512, "ce_spikes": {"every": 2, "weight": 1}},
    ]
    watch = ROLLING | {"rollback": {"rate_factor": 0.5, "ce_spikes": {"every": 4, "weight": 0.1}}}
    sizes = {"tokens": 1024, "context": 16, "batch": 4, "phases": phases, "ce_spikes": None}
    section = recipe(**sizes, watch=watch, rest_rate={"start": 2e-5, "final": 2e-5}).distill
    assert section.after_rollbacks(0) == section
    first, second = section.after_rollbacks(2).parts
    assert (first.mixer_rate.start, first.mixer_rate.final) == (2.5e-4, 2.5e-5)
    assert first.rest_rate.start == second.rest_rate.start == 5e-6
    assert [part.ce_spikes.every for part in (first, second)] == [4, 4]
    assert [step for step in range(16) if section.has_ce_spike(step)] == [9, 11, 13, 15]
    assert [step for step in range(16) if section.after_rollbacks(1).has_ce_spike(step)] == [3, 7, 11, 15]


def test_a_sweep_varies_what_rollbacks_do_and_not_what_is_reported(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(recipe(watch=ROLLING)))
    members = make_members(str(path), {"distill.watch.rollback.rate_factor": [0.5, 0.25]}, {}, "sweep")
    assert [member.recipe.distill.watch.rollback.rate_factor for member in members] == [0.5, 0.25]
    with pytest.raises(UserError, match="it changes memory, speed or what is recorded"):
        make_members(str(path), {"distill.watch.loss_spike.z": [5, 6]}, {}, "sweep")


# The record


def test_a_record_that_is_rewound_keeps_what_led_to_where_it_is(tmp_path: Path):
    record = MetricsRecord(tmp_path / "metrics.jsonl", None)

    def log(*steps: int) -> None:
        for step in steps:
            record.log(step, {"loss": float(step)})

    def seen() -> list[Any]:
        return [(row["event"]["step"], row["event"]["to"]) if "event" in row else row["step"] for row in record.rows()]

    log(1, 2, 3, 4)
    record.event(event(4))
    log(5)
    record.event(event(5, to=2))
    record.rewind(2)
    assert seen() == [1, 2, (4, None), (5, 2)]
    log(3, 4)
    record.event(event(4, to=3))
    record.rewind(3)
    log(4, 5, 6)
    record.event(event(6))
    whole = record.rows()
    assert seen() == [1, 2, (4, None), (5, 2), 3, (4, 3), 4, 5, 6, (6, None)]
    # Restored at 5, in the present history; at 2, after the first rollback and before the second; at 1, before both.
    assert [row["step"] for row in kept_rows(whole, 5)] == [1, 2, 4, 5, 3, 4, 4, 5]
    assert [row["step"] for row in kept_rows(whole, 2)] == [1, 2, 4, 5]
    assert [row["step"] for row in kept_rows(whole, 1)] == [1]
    record.rewind(5)
    assert [row["event"]["step"] for row in record.rows() if "event" in row] == [4, 5, 4]
    record.close()


def test_repeated_steps_are_told_from_new_ones():
    rows: list[dict[str, Any]] = [{"step": 30}, {"step": 50, "event": {"to": 30}}, {"step": 31}, {"step": 45}]
    rows += [{"step": 46, "event": {"to": 40}}, {"step": 41}, {"step": 50}, {"step": 51}]
    repeats = Repeats()
    seen = [(row["step"], repeats.prefix(row)) for row in rows]
    one, two = "rollback-1/", "rollback-2/"
    assert [name for (_, name), row in zip(seen, rows, strict=True) if "event" not in row] == [
        "",
        one,
        one,
        two,
        two,
        "",
    ]


def test_prefect_logs_an_event_once_and_shows_them_all(monkeypatch, caplog):
    tables = []
    monkeypatch.setattr(observe, "show_table", lambda run, label, rows, about: tables.append((run, label, rows)))
    monkeypatch.setattr(observe, "create_progress_artifact", lambda **_: "0" * 32)
    monkeypatch.setattr(observe, "update_progress_artifact", lambda **_: None)
    view = observe.ProgressView("run", "distill")
    with caplog.at_level(logging.WARNING, logger="prefect.radlads"):
        for events in ((), ("a",), ("a",), ("a", "b")):
            view.show(Progress(1, 10, "steps", {}, events))
    assert [record.getMessage() for record in caplog.records] == ["distill: a", "distill: b"]
    assert tables == [
        ("run", "distill-events", [{"event": "a"}]),
        ("run", "distill-events", [{"event": "a"}, {"event": "b"}]),
    ]
