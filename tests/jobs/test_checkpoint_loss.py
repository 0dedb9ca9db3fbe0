"""No checkpoint is lost that a job may need, and none stays that no job can use."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.files import TEMPORARY
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.jobs.checkpoints.checkpoint import Checkpoints
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine

from .test_checkpoint import steps_of as recording
from .test_checkpoint_parts import committed as kept
from .test_checkpoint_parts import filled, make_job, one_attempt  # noqa: F401 - a fixture for every test here
from .test_watch import FAULT, committed, dying_after_note, rolled_job, steps_of

PLACE = "product/checkpoints"


@pytest.fixture
def ref(tmp_path) -> StoreRef:
    return StoreRef(uri=str(tmp_path / "store"))


def checkpoints(tmp_path: Path, ref: StoreRef, *, keep: int = 1) -> Checkpoints:
    """Of a new attempt."""
    return Checkpoints(make_job(tmp_path, ref), filled(0, 1, "partitions"), seed=1, keep=keep)


def save(one: Checkpoints, *steps: int) -> None:
    for step in steps:
        one.save(step)
        one.wait()


def damage(tmp_path: Path, step: int) -> None:
    for place in (tmp_path / "store" / PLACE / f"step-{step:06d}").glob("state-*"):
        place.chmod(0o644)
        place.write_bytes(place.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_of_a_later_step_is_not_kept_in_place_of_a_sound_one(tmp_path, ref, keep):
    save(checkpoints(tmp_path, ref, keep=9), 2, 4, 12, 13)
    damage(tmp_path, 12)
    damage(tmp_path, 13)
    one = checkpoints(tmp_path, ref, keep=keep)
    assert one.restore() == 4
    save(one, 6)
    assert kept(ref) == [4, 6][-keep:]
    assert checkpoints(tmp_path, ref).restore() == 6


def test_a_checkpoint_is_not_written_again_over_itself(tmp_path, ref, monkeypatch):
    """A job that the watch stops where it had stopped before saves that step; writing may fail."""
    save(checkpoints(tmp_path, ref), 2)

    def failing(self, prefix, manifest, *, guard):
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "adopt", failing)
        one = checkpoints(tmp_path, ref)
        assert one.restore() == 2
        save(one, 2)
        with pytest.raises(StoreError, match="the disk is full"):
            save(one, 3)
    assert checkpoints(tmp_path, ref).restore() == 2


def test_what_a_killed_job_was_writing_goes_when_the_next_one_begins(tmp_path, ref):
    save(checkpoints(tmp_path, ref), 2)
    store = LocalStore(ref)
    store.put_bytes(f"{PLACE}/step-000003/state-0000000b0001-00000-00000.safetensors", b"half")
    (tmp_path / "store" / PLACE / "step-000004").mkdir()
    half = tmp_path / "store" / PLACE / "step-000004" / f"{TEMPORARY}0"
    half.touch()
    assert checkpoints(tmp_path, ref).restore() == 2
    assert {key.split("/")[2] for key in store.list(PLACE)} == {"step-000002", "latest"}
    assert not half.parent.exists()


# Rollbacks, when the clock of the machine is set back or on (test_watch.py has the same at an even pace)


@pytest.mark.parametrize(("hours", "die_at", "goes_on_at"), [(-1, None, 7), (1, 12, 10)])
def test_clocks_do_not_tell_which_checkpoints_a_rollback_gave_up(training, monkeypatch, hours, die_at, goes_on_at):
    """It dies when the rollback is on record and nothing is done yet, or later, with a new checkpoint of step 9."""
    job = rolled_job(training, f"clock-{hours}", "loss_spike")
    now = time.time_ns
    with monkeypatch.context() as patch:
        FAULT["loss_spike"](patch, 10)
        dying_after_note(patch, die_at)
        note = train.Watchdog._note

        def noting(self, event):
            patch.setattr(time, "time_ns", lambda: now() + hours * 3600 * 10**9)
            try:
                note(self, event)
            finally:
                patch.setattr(time, "time_ns", now)

        patch.setattr(train.Watchdog, "_note", noting)
        assert execute(train.main, job) == "crash"
    assert committed(job) == [6, 9]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", taken := recording(Engine.step))
        again = Job(spec=job.spec)
        assert execute(train.main, again) == "done", training.ending(again)
    assert taken.numbers[0] == goes_on_at
    assert [row["lr/mixer"] for row in steps_of(again)] == [3e-3] * 6 + [0.25 * 3e-3] * 8
