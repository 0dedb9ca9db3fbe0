"""One process at a time makes a run: who comes second is told, who is dead is followed, who was away is refused."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from radlads.tasks.contracts.job import CodeVersion, JobResources, JobSpec, Manifest, StoreRef
from radlads.tasks.contracts.locks import lease
from radlads.tasks.contracts.locks.lease import (
    LeaseHeld,
    LeaseLost,
    confirm_lease,
    held_by,
    is_live,
    product_lease,
    run_lease,
)
from radlads.tasks.contracts.locks.scratch_lock import FolderInUse, hold_folder
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.specs import PlanSpec
from radlads.tasks.contracts.store.layout import lease_key, product_key, run_key
from radlads.tasks.contracts.store.open import LocalStore, StoreError
from radlads.tasks.launchers import local as launch
from radlads.tasks.launchers.stopping import RunStopped, StopRequest
from radlads.tasks.stage import StageRequest, run_stage

from .conftest import make_store
from .test_stage import RECIPE
from .test_store import sheet

KEY = lease_key(run_key("r"))

OTHER = """
import sys, time
from pathlib import Path
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.locks.lease import product_lease, run_lease
from radlads.tasks.contracts.store.open import open_store
store, work = open_store(StoreRef.model_validate_json(sys.argv[1])), Path(sys.argv[2])
with run_lease(store, "r", work), product_lease(store, "align", "d1", work, run="r"):
    print("holds it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1.5)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)


@pytest.fixture
def store(request, tmp_path):
    """A folder and a server that honours conditions; where a test says so, the others too."""
    return make_store(getattr(request, "param", "local"), request, tmp_path)


two = pytest.mark.parametrize("store", ["local", "moto"], indirect=True)
every = pytest.mark.parametrize("store", ["local", "moto", "rclone", "ceph"], indirect=True)


@pytest.fixture
def other(store, tmp_path):
    """Another process of this machine that holds the lease; it gives it back when its input ends."""
    command = [sys.executable, "-c", OTHER, store.ref.model_dump_json(), str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds it\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(store, key=KEY, **changes):
    """Write the lease of a process of another machine, on condition as that one would: between two beats of ours."""
    while True:
        found = lease._read(store, key)
        now = run_lease(store, "r", Path("/far"))._mine if found is None else found[0]
        holder = now.holder.model_copy(update={"host": "far", "user": "ada", "machine": "another", "pid": 4242})
        made = now.model_copy(update={"holder": holder, "owner": "theirs", **changes})
        data = made.model_dump_json().encode()
        if found is None:
            store.put_bytes(key, data)
            return made
        if store.replace(key, data, found[1]):
            return made


@every
def test_the_second_process_is_told_who_where_and_since_when(store, other, tmp_path):
    began = time.monotonic()
    with pytest.raises(LeaseHeld) as said, run_lease(store, "r", tmp_path):
        pytest.fail("two hold it")
    told = str(said.value)
    assert f"(pid {other.pid}) since 20" in told
    assert f"in {tmp_path}" in told
    assert f"kill {other.pid}" in told
    assert "\n" not in told
    assert time.monotonic() - began < 5
    other.communicate("")
    with run_lease(store, "r", tmp_path) as mine:
        assert mine.ref.token == 2, "every holder has a higher token"


@two
def test_a_killed_holder_of_this_machine_is_followed_at_once(store, other, tmp_path, caplog):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with caplog.at_level(logging.WARNING), run_lease(store, "r", tmp_path) as mine:
        assert mine.ref.token == 2
    assert f"(pid {other.pid})" in caplog.text
    assert "is dead" in caplog.text


@two
def test_a_holder_elsewhere_that_lives_is_seen_to(store, tmp_path):
    beat, stop = iter(range(1000)), threading.Event()
    elsewhere(store)

    def live():
        while not stop.wait(0.05):
            elsewhere(store, beat=next(beat))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(LeaseHeld, match=r"ada@far \(pid 4242\)"), run_lease(store, "r", tmp_path):
            pytest.fail("two hold it")
    finally:
        stop.set()
        thread.join()


@two
def test_a_silent_holder_elsewhere_is_followed_after_its_time(store, tmp_path, caplog, monkeypatch):
    elsewhere(store, token=7)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), run_lease(store, "r", tmp_path) as mine:
        assert mine.ref.token == 8
    assert time.monotonic() - began > 0.2, "it was given time to show itself"
    assert "ada@far (pid 4242)" in caplog.text
    assert "it is taken over in" in caplog.text


def test_a_lease_that_is_old_by_the_stores_clock_is_not_waited_for(store, tmp_path, monkeypatch):
    elsewhere(store)
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1000.0)
    monkeypatch.setattr(type(store), "age", lambda *_: 1001.0)
    began = time.monotonic()
    with run_lease(store, "r", tmp_path):
        assert time.monotonic() - began < 10


def test_the_same_process_may_take_it_again_but_not_twice(store, tmp_path, monkeypatch):
    with run_lease(store, "r", tmp_path) as first:
        with pytest.raises(LeaseHeld, match=f"kill {os.getpid()}"), run_lease(store, "r", tmp_path):
            pytest.fail("two hold it")
        with run_lease(store, "another", tmp_path):
            pass
        assert first.ref.token == 1

    def outage(*_, **__):
        raise StoreError("out of reach")

    with monkeypatch.context() as patch, run_lease(store, "r", tmp_path) as second:
        patch.setattr(type(store), "replace", outage)
    with run_lease(store, "r", tmp_path) as third:  # the one before could not be given back
        assert (second.ref.token, third.ref.token) == (2, 3)


@every
def test_a_holder_that_was_away_finds_out_and_commits_nothing(store, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1000)  # away: a beat on its way would overwrite what is put below
    (tmp_path / "product").mkdir()
    (tmp_path / "product" / "x").write_text("1")
    with run_lease(store, "r", tmp_path) as mine:
        confirm_lease(store, mine.ref)
        theirs = elsewhere(store, token=2)
        for check in (mine.confirm, lambda: confirm_lease(store, mine.ref)):
            with pytest.raises(LeaseLost, match=r"taken over by ada@far \(pid 4242\)"):
                check()
        with pytest.raises(LeaseLost):
            store.commit("runs/r/align", tmp_path / "product", sheet(), guard=lambda: confirm_lease(store, mine.ref))
        assert store.read_manifest("runs/r/align") is None
        assert mine.is_lost
    assert lease._read(store, KEY)[0] == theirs, "what is another's is not given back"


def test_the_heartbeat_finds_out_by_itself(store, tmp_path):
    with run_lease(store, "r", tmp_path) as mine:
        elsewhere(store, token=2)
        end = time.monotonic() + 20
        while not mine.is_lost:
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(LeaseLost):
            mine.check()


@two
def test_the_heartbeat_lives_through_an_outage_and_lost_answers(store, tmp_path, monkeypatch):
    kind, beats = type(store), []
    original = kind.replace

    def unwell(self, key, data, version):
        beats.append(1)
        if len(beats) < 4:
            raise StoreError("out of reach")
        if len(beats) < 7:
            return original(self, key, data, version) and False  # done, and nobody was told
        return original(self, key, data, version)

    monkeypatch.setattr(kind, "replace", unwell)
    with run_lease(store, "r", tmp_path) as mine:
        end = time.monotonic() + 30
        while len(beats) < 10:
            assert time.monotonic() < end
            time.sleep(0.02)
        mine.confirm()
    assert lease._read(store, KEY)[0].released


@two
def test_a_removed_lease_is_lost(store, tmp_path):
    with run_lease(store, "r", tmp_path) as mine:
        store.delete(KEY)
        with pytest.raises(LeaseLost, match="was removed"):
            mine.confirm()


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\x00", b"[]", b'{"token": 0}', b"[" * 5000])
def test_what_is_no_lease_is_said_in_one_line(tmp_path, data):
    store = LocalStore(StoreRef(uri=str(tmp_path / "store")))
    store.put_bytes(KEY, data)
    message = r"is not a valid lease.*delete that file"
    with pytest.raises(Exception, match=message) as said, run_lease(store, "r", tmp_path):
        pytest.fail("taken")
    assert "\n" not in str(said.value)


# The folder on this machine


def test_a_folder_is_one_processs(tmp_path):
    with hold_folder(tmp_path, "lock", what="the folder of run 'r'"):
        with pytest.raises(FolderInUse) as said, hold_folder(tmp_path, "lock", what="the folder of run 'r'"):
            pytest.fail("two hold it")
        assert f"(pid {os.getpid()}) since 20" in str(said.value)
        assert "--work" in str(said.value)
    with hold_folder(tmp_path, "lock", what="x") as waited:
        assert not waited


def test_a_folder_may_be_waited_for(tmp_path, caplog):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with hold_folder(tmp_path, "lock", what="x"):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(30)
    threading.Timer(0.3, leave.set).start()
    with hold_folder(tmp_path, "lock", what="the dataset", wait_seconds=30) as waited:
        assert waited
    assert "the dataset is in use by" in caplog.text
    thread.join()


def test_waiting_for_a_folder_ends_when_the_caller_says_so(tmp_path):
    """As run_stage does, so that the first Ctrl-C ends a run that waits for another one's scratch folder."""
    request = StopRequest()
    with hold_folder(tmp_path, "lock", what="x"):
        request.ask()
        waiting = hold_folder(tmp_path, "lock", what="x", wait_seconds=float("inf"), look=request.check)
        with pytest.raises(RunStopped), waiting:
            pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Exception, match=r"cannot work in .*: a part of this path is a file"),
        hold_folder(tmp_path / "file" / "x", "lock", what="x"),
    ):
        pass


# Products


@every
def test_a_product_is_made_by_one_process_and_the_other_is_told_who(store, other, tmp_path):
    with pytest.raises(LeaseHeld) as said, product_lease(store, "align", "d1", tmp_path, run="s"):
        pytest.fail("two hold it")
    assert said.value.by.startswith("made by ")
    assert f"(pid {other.pid}) since 20" in said.value.by
    assert said.value.by.endswith("for the run 'r'")
    assert "align d1" in str(said.value)
    prefix = product_key("align", "d1")
    assert is_live(store, prefix)
    with product_lease(store, "align", "d2", tmp_path) as mine:
        assert mine.ref.key == "products/align/d2/lease.json"
    other.communicate("")
    assert not is_live(store, prefix)
    assert held_by(store, prefix) is None
    with product_lease(store, "align", "d1", tmp_path) as mine:
        assert mine.ref.token == 2


@two
def test_a_dead_maker_does_not_live(store, other, tmp_path):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    prefix = product_key("align", "d1")
    assert not is_live(store, prefix)
    assert held_by(store, prefix) is not None, "it was not given back: somebody has to look after what it left"


def test_a_silent_maker_elsewhere_lives_for_its_time(store, monkeypatch):
    elsewhere(store, lease_key(product_key("align", "d1")))
    assert is_live(store, product_key("align", "d1"))
    monkeypatch.setattr(type(store), "age", lambda *_: lease.EXPIRY_SECONDS + 1)
    assert not is_live(store, product_key("align", "d1"))


@every
def test_a_lease_that_was_removed_and_made_again_is_another_one(store, tmp_path, monkeypatch):
    """A collector removes a product with its lease; the token of the next one is 1 again."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1000)
    with product_lease(store, "align", "d1", tmp_path) as first:
        store.delete(first.ref.key)
        with product_lease(store, "align", "d1", tmp_path) as second:
            assert first.ref.token == second.ref.token
            confirm_lease(store, second.ref)
            with pytest.raises(LeaseLost):
                confirm_lease(store, first.ref)


# Two writers of one run


@pytest.fixture
def ask(store, tmp_path):
    """The request of a process for a stage of the run, under its lease; name: of its work folder."""

    def make(held=None, name="work"):
        return StageRequest(
            stage="plan", run="r", recipe="tiny", spec=PlanSpec(recipe=parse_recipe(RECIPE)), inputs={},
            store=store, work=tmp_path / name, lease=held,
            resources=JobResources(device="cpu", processes=1, threads=1),
        )  # fmt: skip

    return make


def record(steps):
    return "".join(json.dumps({"step": step, "time": step, "loss": 1 / step}) + "\n" for step in range(1, steps + 1))


def commit(store, spec):
    scratch = Path(spec.scratch)
    (scratch / "output").mkdir(exist_ok=True)
    (scratch / "output" / "plan.json").write_text("{}")
    manifest = Manifest(
        stage=spec.stage, digest=spec.digest, spec=spec.spec, files=(), code=CodeVersion(sha=None, versions={}),
        created_at=datetime.now(UTC),
    )  # fmt: skip
    guard = (lambda: confirm_lease(store, spec.lease)) if spec.lease else (lambda: None)
    return store.commit(store.key(spec.output_uri), scratch / "output", manifest, guard=guard)


@two
def test_of_two_writers_one_makes_the_run_and_its_record_is_whole(store, ask, tmp_path, monkeypatch):
    """The example that asked for the lease: the second process, once it was ended, left 88 rows of 160 on record."""
    working, refused = threading.Event(), threading.Event()

    def job(command, *, env, cwd, log, on_tick, grace_seconds):
        spec = JobSpec.model_validate_json(Path(command[-1]).read_text())
        (cwd / "metrics.jsonl").write_text(record(88))
        working.set()
        assert refused.wait(30)
        (cwd / "metrics.jsonl").write_text(record(160))
        commit(store, spec)
        (cwd / "exit.json").write_text('{"reason": "done", "message": ""}')
        return 0

    monkeypatch.setattr(launch, "run_process", job)
    made = []

    def first():
        with run_lease(store, "r", tmp_path) as held:
            made.append(run_stage(ask(held)))

    thread = threading.Thread(target=first)
    thread.start()
    assert working.wait(30)
    with pytest.raises(LeaseHeld), run_lease(store, "r", tmp_path) as held:
        run_stage(ask(held, "second"))
    with pytest.raises(FolderInUse), hold_folder(ask().scratch, "stage.lock", what="x"):
        pass
    refused.set()
    thread.join(60)
    assert made[0].manifest == store.read_manifest(ask().key)
    assert store.get_bytes(f"{ask().key}/job/metrics.jsonl").decode() == record(160)
    assert json.loads(store.get_bytes(f"{ask().key}/job/exit.json"))["reason"] == "done"


@two
def test_a_stale_owner_writes_neither_product_nor_papers(store, ask, tmp_path, monkeypatch):
    """The first process sleeps through its lease; the second makes the stage; then the first wakes up."""
    store.put_bytes(f"{ask().key}/job/metrics.jsonl", record(160).encode())

    def job(command, *, env, cwd, log, on_tick, grace_seconds):
        spec = JobSpec.model_validate_json(Path(command[-1]).read_text())
        (cwd / "metrics.jsonl").write_text(record(88))
        elsewhere(store, spec.lease.key, token=spec.lease.token + 1)
        (cwd / "progress.json").write_text('{"done": 1, "total": 2, "unit": "steps"}')
        try:
            commit(store, spec)
        except LeaseLost as error:
            (cwd / "exit.json").write_text(json.dumps({"reason": "config", "message": str(error)}))
        return 2

    monkeypatch.setattr(launch, "run_process", job)
    with run_lease(store, "r", tmp_path) as held:
        with pytest.raises((launch.JobFailed, LeaseLost), match="taken over by ada@far"):
            run_stage(ask(held))
        assert not held.is_lost, "the run is still this process's, the product is another's"
    assert store.read_manifest(ask().key) is None
    assert store.get_bytes(f"{ask().key}/job/metrics.jsonl").decode() == record(160)


@pytest.mark.parametrize("whose", ["run", "product"])
def test_a_job_is_stopped_once_the_run_or_the_product_is_anothers(store, ask, tmp_path, monkeypatch, whose):
    ticks = []

    def job(command, *, env, cwd, log, on_tick, grace_seconds):
        elsewhere(store, KEY if whose == "run" else lease_key(ask().key), token=2)
        for step in range(1, 600):
            (cwd / "progress.json").write_text(json.dumps({"done": step, "total": 600, "unit": "steps"}))
            ticks.append(step)
            on_tick()
            time.sleep(0.05)
        return 0

    monkeypatch.setattr(launch, "run_process", job)
    with run_lease(store, "r", tmp_path) as held, pytest.raises(LeaseLost):
        run_stage(ask(held))
    assert len(ticks) < 500


# Two runs that want the same product


def finishing(store, job_record=3):
    """A job that commits."""

    def job(command, *, env, cwd, log, on_tick, grace_seconds):
        spec = JobSpec.model_validate_json(Path(command[-1]).read_text())
        with (cwd / "metrics.jsonl").open("a") as stream:
            stream.write(record(job_record))
        commit(store, spec)
        (cwd / "exit.json").write_text('{"reason": "done", "message": ""}')
        return 0

    return job


@two
def test_a_second_run_waits_for_what_another_makes_and_says_so_once(store, ask, tmp_path, monkeypatch, caplog):
    working, leave, jobs = threading.Event(), threading.Event(), []
    finish = finishing(store)

    def job(command, **named):
        jobs.append(command)
        working.set()
        assert leave.wait(30)
        return finish(command, **named)

    monkeypatch.setattr(launch, "run_process", job)
    monkeypatch.setattr("radlads.tasks.stage._POLL_SECONDS", 0.05)
    made = {}

    def run(name):
        with run_lease(store, name, tmp_path / name) as held:
            made[name] = run_stage(replace(ask(held, name), run=name))

    threads = [threading.Thread(target=run, args=[name]) for name in ("a", "b")]
    threads[0].start()
    assert working.wait(30)
    with caplog.at_level(logging.WARNING):
        threads[1].start()
        time.sleep(0.7)
        leave.set()
        for thread in threads:
            thread.join(60)
    assert len(jobs) == 1
    assert (made["a"].reused, made["b"].reused) == (False, True)
    assert made["a"].manifest == made["b"].manifest
    told = [line for line in caplog.messages if "waiting for it" in line]
    assert len(told) == 1
    assert f"(pid {os.getpid()}) since 20" in told[0]
    assert "for the run 'a'" in told[0]


@two
def test_a_second_run_goes_on_from_a_dead_maker(store, ask, tmp_path, monkeypatch, caplog):
    """Another machine dies over a product: its record and its checkpoints are there for whoever takes over."""
    key = ask().key
    theirs = elsewhere(store, lease_key(key), run="a", token=4)
    store.put_bytes(f"{key}/checkpoints/step-000005/state", b"moments")
    store.put_bytes(f"{key}/job/metrics.jsonl", record(5).encode())
    seen = []

    def job(command, *, cwd, **named):
        spec = JobSpec.model_validate_json(Path(command[-1]).read_text())
        seen.append((spec.lease.token, store.list(f"{key}/checkpoints"), (cwd / "metrics.jsonl").read_text()))
        return finishing(store)(command, cwd=cwd, **named)

    monkeypatch.setattr(launch, "run_process", job)
    with run_lease(store, "b", tmp_path / "b") as held:
        product = run_stage(replace(ask(held), run="b"))
    assert not product.reused
    assert seen == [(theirs.token + 1, [f"{key}/checkpoints/step-000005/state"], record(5))]
    assert "it is taken over in" in caplog.text
    assert store.list(f"{key}/checkpoints") == []


def test_the_wait_for_another_run_can_be_stopped(store, ask, tmp_path, monkeypatch):
    class AskedError(Exception):
        pass

    beat, stop, looks = iter(range(10000)), threading.Event(), []
    key = lease_key(ask().key)
    elsewhere(store, key)

    def live():
        while not stop.wait(0.05):
            elsewhere(store, key, beat=next(beat))

    def check():
        looks.append(1)
        if len(looks) > 3:
            raise AskedError

    monkeypatch.setattr("radlads.tasks.stage._POLL_SECONDS", 0.05)
    monkeypatch.setattr("radlads.tasks.stage.REQUEST.check", check)
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with run_lease(store, "b", tmp_path) as held, pytest.raises(AskedError):
            run_stage(ask(held))
    finally:
        stop.set()
        thread.join()


def test_another_stores_record_is_not_gone_on_with(ask, tmp_path, monkeypatch):
    """Two stores, one work folder: products of one digest share the scratch folder, not what is in it."""
    stores = [LocalStore(StoreRef(uri=str(tmp_path / name))) for name in ("one", "two")]
    crashed = []

    def job(command, *, cwd, **named):
        if not crashed:
            crashed.append(1)
            (cwd / "metrics.jsonl").write_text(record(7))
            (cwd / "exit.json").write_text('{"reason": "crash", "message": "boom"}')
            return 1
        return finishing(stores[1])(command, cwd=cwd, **named)

    monkeypatch.setattr(launch, "run_process", job)
    with pytest.raises(launch.JobCrashed):
        run_stage(replace(ask(), store=stores[0]))
    run_stage(replace(ask(), store=stores[1]))
    assert stores[1].get_bytes(f"{ask().key}/job/metrics.jsonl").decode() == record(3)
    assert stores[0].get_bytes(f"{ask().key}/job/metrics.jsonl").decode() == record(7)
