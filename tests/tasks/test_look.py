"""Where a run stands by its store alone: at work, killed, silent, stopped; and what its process leaves there."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from radlads.flows.cli import app
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec
from radlads.tasks.contracts.locks.lease import held_by, product_lease, run_lease
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import claim_layout, recipe_key, run_key
from radlads.tasks.contracts.store.pointers import point
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.launchers.stopping import StopRequest
from radlads.tasks.look import note as notes
from radlads.tasks.look import stage_state, stop_request
from radlads.tasks.look.all_runs import look_at_all
from radlads.tasks.look.note import Publisher, read_note
from radlads.tasks.look.resume import how_to_resume
from radlads.tasks.look.run_state import find_run, look
from radlads.tasks.look.stop_request import StopWatch, leave_request, read_request
from radlads.tasks.look.stop_run import ask_to_stop, wait_until_stopped

# A run whose jobs only say how far they are, and save when they are told to stop. Not the command: no Prefect.
PROGRAM = """
    import sys
    from radlads.tasks.graph import convert
    from radlads.tasks.launchers import local
    from radlads.tasks.launchers.stopping import RunStopped
    from radlads.tasks.look import note, stop_request
    from radlads.tasks.pipeline import open_pipeline
    from radlads.tasks.plain_runner import PlainRunner
    recipe, job, store, work = sys.argv[1:]
    local.render_command = lambda spec, job_json, **_: [sys.executable, job, str(job_json)]
    note.PUBLISH_SECONDS = stop_request.LOOK_SECONDS = 0.2
    places = {"store": store, "tracking": "none", "work": work}
    try:
        with open_pipeline(recipe, run="r1", run_id="x", **places) as pipeline:
            from radlads.tasks.launchers.stopping import REQUEST
            with REQUEST.flow():
                convert(pipeline.recipe, PlainRunner(pipeline))
    except RunStopped as error:
        sys.exit(f"stopped: {error}")
"""
JOB = """
    import json, os, signal, time
    def ending(*_):
        open("exit.json", "w").write('{"reason": "preempted", "message": ""}')
        os._exit(75)
    signal.signal(signal.SIGTERM, ending)
    print("at work", flush=True)
    open("metrics.jsonl", "w").write('{"step": 120, "time": 1, "loss": 0.5, "tokens_per_second": 1000.0}\\n')
    open("progress.json", "w").write('{"done": 120, "total": 500, "unit": "steps"}')
    time.sleep(1000)
"""
RECIPE = {"name": "tiny", "teacher": {"path": "demo"}, "student": {"attention_layers": [1]},
          "data": {"train": {"sources": [{"kind": "files", "paths": ["corpus.txt"]}]}},
          "align": {"data": "train", "tokens": 4096, "context": 64, "batch": 4, "micro_batch": 2}}  # fmt: skip


pytestmark = pytest.mark.parametrize("store", ["local", "moto"], indirect=True)


@pytest.fixture
def place(store):
    claim_layout(store)
    return store


@pytest.fixture
def at_work(place, tmp_path):
    """A run in a process of its own, once its first job has said how far it is."""
    (tmp_path / "corpus.txt").write_text("once upon a time")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, text in (("program.py", PROGRAM), ("job.py", JOB)):
        (tmp_path / name).write_text(textwrap.dedent(text))
    arguments = [str(tmp_path / name) for name in ("program.py", "tiny.yaml", "job.py")]
    env = {**os.environ, "RADLADS_HOME": str(tmp_path / "home")}
    if place.ref.endpoint_url:
        env["RADLADS_S3_ENDPOINT"] = place.ref.endpoint_url
    command = [sys.executable, *arguments, place.uri, str(tmp_path / "work")]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: told(place) or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    yield process
    process.kill()
    process.wait()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def told(store):
    """Whether the store knows how far the run's plan is."""
    with_runs = [key for key in store.list("products") if key.endswith("progress.json")]
    note = read_note(store, with_runs[0].removesuffix("/job/progress.json")) if with_runs else None
    return note is not None and note.done is not None


def elsewhere(monkeypatch):
    """As another machine sees it: no process of this one is known."""
    monkeypatch.setattr("radlads.tasks.contracts.locks.holder._machine", lambda: "another")


@pytest.mark.slow
def test_a_run_at_work_then_killed(place, at_work, monkeypatch):
    state = look(place, "r1")
    (plan,) = state.current
    assert (state.word, state.recipe, plan.word) == ("running", "tiny", "running")
    assert (plan.done, plan.total, plan.unit, plan.loss, plan.tokens_per_second) == (120, 500, "steps", 0.5, 1000)
    labels = ["plan", "tokenize-train", "transplant", "align", "publish"]
    assert [stage.label for stage in state.stages] == labels
    assert f"(pid {at_work.pid})" in state.where
    with monkeypatch.context() as patch:  # by the store alone
        elsewhere(patch)
        again = look(place, "r1")
        assert (again.word, again.current[0].done) == ("running", 120)
    env = {"RADLADS_S3_ENDPOINT": place.ref.endpoint_url or "", "COLUMNS": "100"}
    shown = CliRunner().invoke(app, ["status", "r1", "--store", place.uri], env=env).stdout
    assert "120/500 steps 24%" in shown
    with pytest.raises(UserError, match=r"the run 'r1' is at work, by .*radlads stop r1"):
        how_to_resume(place, "r1")
    at_work.send_signal(signal.SIGKILL)
    at_work.wait()
    state = look(place, "r1")
    assert (state.word, state.stages[0].word, state.stages[0].done) == ("died", "died", 120)
    assert state.last_seen_seconds < 60
    assert ask_to_stop(place, state).how == "nothing"
    with monkeypatch.context() as patch:  # elsewhere a dead process is only silent, and not at once
        elsewhere(patch)
        assert look(place, "r1").word == "running"
        patch.setattr(stage_state, "EXPIRY_SECONDS", -1.0)
        assert look(place, "r1").word == "silent"
    how = how_to_resume(place, "r1")
    assert "name: tiny" in how.recipe
    assert how.work is not None
    assert how.tracking == "none"


@pytest.mark.slow
def test_a_run_is_stopped_by_a_request_in_the_store(place, at_work):
    asked = ask_to_stop(place, look(place, "r1"))
    assert asked.how == "request"  # its process is no command that knows what a signal means
    said = []
    assert wait_until_stopped(place, "r1", asked, 60, said.append)
    _, err = at_work.communicate(timeout=60)
    assert "stopped: stopped in plan at 120 of 500 steps" in err
    state = look(place, "r1")
    assert (state.word, state.stages[0].word, state.stages[0].done) == ("stopped", "stopped", 120)
    assert read_request(place, "r1") is None


def test_a_request_stops_its_own_attempt_alone(place, tmp_path, monkeypatch):
    request = StopRequest()
    monkeypatch.setattr(stop_request, "REQUEST", request)
    monkeypatch.setattr(stop_request, "LOOK_SECONDS", 0.01)
    with run_lease(place, "r1", tmp_path):
        leave_request(place, "r1", held_by(place, run_key("r1")), "elsewhere")
    with run_lease(place, "r1", tmp_path) as lease, StopWatch(place, "r1", lease) as watch:
        watch._thread.join(0.5)
        assert request.asked_at is None
        leave_request(place, "r1", held_by(place, run_key("r1")), "elsewhere")
        watch._thread.join(20)
    assert request.asked_at is not None
    assert request.hurried_at is None


@pytest.fixture
def publisher(place, tmp_path, monkeypatch):
    """publisher(store) of a job whose product's lease is held."""
    monkeypatch.setattr(notes, "PUBLISH_SECONDS", 0.01)
    resources = JobResources(device="cuda", processes=2, threads=1, dollars_per_gpu_hour=3.0)
    spec = JobSpec(
        stage="align", run="r1", recipe="tiny", digest="d", spec={}, output_uri=place.join("products/align/d"),
        store=place.ref, resources=resources, scratch=str(tmp_path / "scratch"),
    )  # fmt: skip
    Path(spec.scratch).mkdir()
    with product_lease(place, "align", "d", Path(spec.scratch), run="r1") as lease:
        yield lambda store=place: Publisher(store, "products/align/d", spec, lease)


def test_the_note_says_speed_time_left_and_cost(place, publisher, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(notes, "time", type("T", (), {"monotonic": staticmethod(lambda: clock[0])}))
    (tmp_path / "scratch" / "log.txt").write_text("at work\n")
    with publisher() as one:
        one.see(Progress(done=10, total=100, unit="steps", metrics={"loss": 2.0, "grad_norm": float("nan")}))
        clock[0] += 1800
        one.see(Progress(done=40, total=100, unit="steps", metrics={"loss": 1.0}))
    note = read_note(place, "products/align/d")
    assert (note.done, note.total, note.metrics) == (40, 100, {"loss": 1.0})
    assert note.seconds_left == pytest.approx(60 * 1800 / 30)
    assert (note.seconds, note.gpu_hours, note.dollars) == (1800, 1.0, 3.0)
    with publisher() as one:  # another attempt: its time is added
        clock[0] += 1800
        one.see(Progress(done=30, total=100, unit="steps"))
    note = read_note(place, "products/align/d")
    assert (note.seconds, note.dollars, note.seconds_left) == (3600, 6.0, None)


def test_the_log_follows_into_the_store(place, publisher, tmp_path):
    (tmp_path / "scratch" / "log.txt").write_text("at work\n")
    with publisher():
        wait_for(lambda: place.get_bytes("products/align/d/job/log.txt") == b"at work\n", 20)


def test_a_store_that_is_away_disturbs_no_job(place, publisher, monkeypatch, caplog):
    monkeypatch.setattr(place, "put_bytes", lambda *_: (_ for _ in ()).throw(StoreError("away")))
    with publisher() as one:
        one.see(Progress(done=1, total=2, unit="steps"))
        wait_for(lambda: "the progress in the store is not renewed: away" in caplog.text, 20)
    assert caplog.text.count("is not renewed") == 1


def test_runs_of_a_store(place, tmp_path):
    with pytest.raises(UserError, match="has no runs yet"):
        find_run(place, None)
    for name in ("first", "second"):
        place.put_bytes(recipe_key(name), yaml.safe_dump(RECIPE).encode())
        with run_lease(place, name, tmp_path) as lease:
            point(place, name, "plan", "plan", "0" * 64, lease)
    states = look_at_all(place)
    assert [(state.run, state.word, state.done) for state in states] == [
        ("first", "stopped", 0),
        ("second", "stopped", 0),
    ]
    assert find_run(place, None) == "second"
    with run_lease(place, "first", tmp_path):
        assert find_run(place, None) == "first"  # at work
    with pytest.raises(UserError, match=r"there is no run 'secnd' in .*; did you mean 'second'\?"):
        look(place, "secnd")
    with pytest.raises(UserError, match="cannot be a run's name"):
        look(place, "../x")


def test_a_recipe_of_another_version_leaves_what_is_known(place, tmp_path):
    place.put_bytes(recipe_key("r1"), b"name: tiny\nunheard_of: 1\n")
    with run_lease(place, "r1", tmp_path) as lease:
        point(place, "r1", "tokenize-train", "tokenize", "0" * 64, lease)
        point(place, "r1", "plan", "plan", "1" * 64, lease)
    state = look(place, "r1")
    assert (state.recipe, [stage.label for stage in state.stages]) == ("", ["plan", "tokenize-train"])
