"""How jobs end: exit.json and exit codes, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef, JobResources, JobSpec, LeaseRef, Manifest, StoreRef
from radlads.tasks.contracts.locks.holder import this_process
from radlads.tasks.contracts.locks.lease import LeaseSheet
from radlads.tasks.contracts.locks.scratch_lock import hold_folder
from radlads.tasks.jobs import waiting
from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.common import Job, NonFiniteError, Preempted, execute, open_job
from radlads.tasks.jobs.exit_reasons import StoppedByWatch, write_ending, write_json
from radlads.tasks.jobs.waiting import wait_for

RECIPE = {"name": "x", "teacher": {"path": "t"}, "data": {"train": {"sources": [{"kind": "sample", "tokens": 1}]}}}


@pytest.fixture
def job(tmp_path) -> Job:
    store = StoreRef(uri=str(tmp_path / "store"))
    spec = JobSpec(
        stage="publish",
        run="r",
        recipe="x",
        digest="d" * 64,
        spec={"section": {}, "recipe": RECIPE},
        inputs={"plan": InputRef(uri=f"{store.uri}/runs/r/plan", digest="p" * 64)},
        output_uri=f"{store.uri}/runs/r/publish",
        store=store,
        resources=JobResources(device="cpu", processes=1, threads=1),
        scratch=str(tmp_path / "scratch"),
    )
    write_json(tmp_path / "scratch" / "job.json", json.loads(spec.model_dump_json()))
    return open_job(tmp_path / "scratch" / "job.json")


def ending(job: Job) -> dict:
    return json.loads((job.scratch / "exit.json").read_text())


def test_ranks_wait_for_the_one_that_works_as_long_as_it_goes_on(job, monkeypatch):
    """Not at a collective, whose time limit a large corpus or a slow upload outlasts."""
    marker, progress = job.scratch / "committed.json", job.scratch / "progress.json"
    clock = [1e9]
    ticks: list[float] = []

    def sleep(_seconds: float) -> None:
        ticks.append(clock[0])
        clock[0] += 4 * 3600
        if len(ticks) == 5:
            write_json(marker, {})
        elif len(ticks) < 5:
            write_json(progress, {"done": len(ticks)})
            os.utime(progress, (clock[0], clock[0]))

    monkeypatch.setattr(waiting, "time", SimpleNamespace(time=lambda: clock[0], sleep=sleep))
    wait_for(marker, job.scratch)
    assert len(ticks) == 5
    marker.unlink()
    with pytest.raises(TimeoutError, match=r"waited for committed\.json, but the rank that works alone reports no"):
        wait_for(marker, job.scratch)


def test_a_rank_does_not_take_what_an_earlier_attempt_left(job, monkeypatch):
    write_json(job.scratch / "committed.json", {})
    seen: list[bool] = []
    monkeypatch.setattr(Job, "open_process_group", lambda self: seen.append((self.scratch / "committed.json").exists()))
    monkeypatch.setattr(Job, "barrier", lambda _: None)
    job.world_size = 2
    assert execute(lambda _: None, job) == "done"
    assert seen == [False]
    assert (job.scratch / "committed.json").exists()


def test_a_job_that_ends_well_is_committed(job):
    def main(job: Job) -> dict:
        (job.output / "answer.txt").write_text("42")
        return {"answer": 42}

    assert execute(main, job) == "done"
    manifest = job.store.read_manifest("runs/r/publish")
    assert manifest is not None
    assert manifest.metrics == {"answer": 42}
    assert [file.path for file in manifest.files] == ["answer.txt"]
    assert manifest.digest == job.spec.digest
    assert "torch" in manifest.code.versions
    assert ending(job)["reason"] == "done"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("mend this"), "config"),
        (StoppedByWatch("step 3"), "watch"),
        (NonFiniteError("step 3"), "nonfinite"),
        (Preempted(), "preempted"),
        (KeyboardInterrupt(), "preempted"),
        (MemoryError(), "out-of-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out-of-memory"),
        (ValueError("a bug\nin two lines"), "crash"),
    ],
)
def test_every_failure_is_written_down_in_one_line(job, error, reason):
    def main(job: Job) -> None:
        raise error

    assert execute(main, job) == reason
    assert ending(job)["reason"] == reason
    assert "\n" not in ending(job)["message"]
    assert job.store.read_manifest("runs/r/publish") is None


def test_an_earlier_attempts_ending_is_forgotten(job):
    write_ending(job.scratch, 0, "crash", "long ago")

    def main(job: Job) -> None:
        assert not (job.scratch / "exit.json").exists()

    assert execute(main, job) == "done"


def test_a_job_that_finds_another_in_its_folder_writes_nothing_there(job, monkeypatch, caplog):
    monkeypatch.setattr("radlads.tasks.jobs.exit_reasons._FOLDER_SECONDS", 0.0)
    with hold_folder(job.scratch, "job.lock", what="x"):
        assert execute(lambda job: pytest.fail("ran"), job) == "crash"
    assert f"(pid {os.getpid()})" in caplog.text
    assert sorted(path.name for path in job.scratch.iterdir()) == ["job.json", "job.lock"]
    assert execute(lambda job: {}, job) == "done"


def test_what_another_process_has_taken_over_is_not_committed(job):
    spec = job.spec.model_copy(update={"lease": LeaseRef(key="runs/r/lease.json", token=1)})
    theirs = LeaseSheet(token=2, owner="theirs", holder=this_process(job.scratch))
    job.store.put_bytes("runs/r/lease.json", theirs.model_dump_json().encode())
    assert execute(lambda job: {}, Job(spec=spec)) == "config"
    assert "was taken over by" in ending(job)["message"]
    assert job.store.read_manifest("runs/r/publish") is None


def test_the_rank_that_fails_first_names_the_cause(tmp_path):
    write_ending(tmp_path, 1, "out-of-memory", "rank 1 had too much")
    write_ending(tmp_path, 0, "crash", "connection closed by peer")
    assert json.loads((tmp_path / "exit.json").read_text())["message"] == "rank 1 had too much"
    assert json.loads((tmp_path / "exit-rank1.json").read_text())["reason"] == "out-of-memory"


def test_inputs_are_checked_against_what_was_planned(job, tmp_path):
    with pytest.raises(UserError, match="'plan' is not there"):
        job.input("plan")
    with pytest.raises(UserError, match="needs the input 'student'; this job was given: plan"):
        job.input("student")
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text("{}")
    manifest = Manifest(
        stage="plan", digest="q" * 64, spec={}, files=(), code=code_version(), created_at=datetime.now(UTC)
    )
    job.store.commit("runs/r/plan", tmp_path / "plan", manifest)
    with pytest.raises(UserError, match="another product"):
        job.input("plan")
    spec = job.spec.model_copy(update={"inputs": {"plan": InputRef(uri=job.spec.inputs["plan"].uri, digest="q" * 64)}})
    assert (Job(spec=spec).input("plan") / "plan.json").read_text() == "{}"


def test_progress_is_told_at_most_about_once_a_second(job):
    path = job.scratch / "progress.json"
    for done in range(1, 100):
        job.progress(done, 100, "steps")
    assert json.loads(path.read_text()) == {"done": 1, "total": 100, "unit": "steps"}
    job.shown.announce("an event is not delayed")
    job.progress(50, 100, "steps")
    assert json.loads(path.read_text())["events"] == ["an event is not delayed"]
    job.progress(100, 100, "steps")
    assert json.loads(path.read_text())["done"] == 100


PROGRAM = """
import sys, time
from radlads.tasks.jobs.common import run_job
def main(job):
    (job.scratch / "ready").touch()
    time.sleep(60)
run_job(main)
"""


def test_sigterm_ends_an_ordinary_job_at_once(job):
    command = [sys.executable, "-c", PROGRAM, str(job.scratch / "job.json")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (job.scratch / "ready").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(1)  # a signal just before its sleep enters the kernel would wait for the end of the sleep
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert ending(job)["reason"] == "preempted"


def test_without_a_job_the_usage_is_told():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


def test_a_job_starts_without_what_it_does_not_need():
    check = "import sys, radlads.tasks.jobs.common; print({'torch', 'boto3', 'mlflow', 'prefect'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "set()"
