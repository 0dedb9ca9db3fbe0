"""Ctrl-C at a terminal, and how the end of a run in the foreground is said: once, with what helps."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Running
from rich.console import Console
from typer.testing import CliRunner

from radlads.flows import cli, demo, services
from radlads.flows.foreground import command_line
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.locks.lease import run_lease
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.contracts.settings import resolve_settings
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.contracts.store.pointers import point

# `radlads`, with a job that only waits: for SIGTERM, upon which it "saves" as a training job does, unless `stubborn`.
PROGRAM = """
    import sys
    from pathlib import Path
    from radlads.tasks.launchers import local as launch
    from radlads.flows import cli
    program, mode, *sys.argv[1:] = sys.argv[1:]
    launch.render_command = lambda spec, job_json, **_: [sys.executable, program, mode, str(job_json)]
    cli.main()
"""
JOB = """
    import json, os, signal, sys, time
    mode = sys.argv[1]
    def ending(reason, message):
        open("exit.json", "w").write(json.dumps({"reason": reason, "message": message}))
        os._exit(75)
    if mode == "saves":
        signal.signal(signal.SIGTERM, lambda *_: ending("preempted", ""))
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode in ("config", "crash"):
        ending(mode, "no luck today")
    open("progress.json", "w").write('{"done": 120, "total": 500, "unit": "steps"}')
    open("pid", "w").write(str(os.getpid()))
    time.sleep(1000)
"""


class Terminal:
    """A command in a process group of its own, as a shell starts it in the foreground, where SIGINT is not ignored."""

    def __init__(self, folder, recipe, mode, *, api, first=("run",)):
        (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
        (folder / "job.py").write_text(textwrap.dedent(JOB))
        self.folder = folder
        self.arguments = [
            first[0], recipe, *first[1:], "--run", "r1",
            "--set", "align.tokens=8192", "--set", "student.attention_layers=[0, 1]",
            "--store", str(folder / "my store"), "--tracking", "none",
        ]  # fmt: skip
        env = {**os.environ, "RADLADS_HOME": str(folder / "home"), "RADLADS_RETRIES": "0", "NO_COLOR": "1"}
        env["PREFECT_HOME"] = str(folder / "prefect")
        env.pop("PREFECT_API_URL", None)
        if api:
            env["PREFECT_API_URL"] = api
        command = [sys.executable, str(folder / "program.py"), str(folder / "job.py"), mode, *self.arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def wait_for_job(self):
        end = time.monotonic() + 120
        while not (pids := [pid for pid in (self.folder / "home/work").glob("products/plan/*/pid") if pid.read_text()]):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1.5)  # until the launcher has read how far it is
        return int(pids[0].read_text())

    def interrupt(self, number=signal.SIGINT):
        os.killpg(self.process.pid, number)

    def end(self, seconds):
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


@pytest.fixture
def terminal(tmp_path, recipe, request):
    started = []

    def start(mode, *, server, first=("run",)):
        api = None
        if server:
            request.getfixturevalue("prefect_server")
            api = PREFECT_API_URL.value()
        started.append(Terminal(tmp_path, recipe, mode, api=api, first=first))
        return started[0]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)


def said(err):
    """Lines on the terminal after the beginning of the run, without Prefect's own times."""
    return [line for line in err.splitlines() if "stopped" in line or "error" in line.lower() or "Traceback" in line]


SWEEP = ("sweep", "--grid", "distill.tokens=4096,8192")


@pytest.mark.slow
@pytest.mark.parametrize(("server", "first"), [(True, ("run",)), (False, ("run",)), (True, SWEEP)])
def test_ctrl_c_ends_a_run_in_order(terminal, server, first):
    run = terminal("saves", server=server, first=first)
    pid = run.wait_for_job()
    before = time.monotonic()
    run.interrupt()
    code, out, err = run.end(30)
    assert time.monotonic() - before < 20
    assert code == 130
    (line,) = said(out + err)
    where, _, again = line.partition("; to continue: ")
    assert where == "stopped in plan at 120 of 500 steps"
    assert shlex.split(again) == ["radlads", *run.arguments]
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_run_ends_it_in_order(terminal):
    """As `timeout` and batch systems send it, twice; the temporary server of Prefect is among the processes."""
    run = terminal("saves", server=False)
    pid = run.wait_for_job()
    run.interrupt(signal.SIGTERM)
    time.sleep(0.2)
    run.interrupt(signal.SIGTERM)
    code, out, err = run.end(30)
    assert code == 143
    (line,) = said(out + err)
    assert line.startswith("stopped in plan at 120 of 500 steps; to continue: ")
    assert not Path(f"/proc/{pid}").exists()


def test_a_second_ctrl_c_does_not_wait_for_the_job(terminal):
    run = terminal("stubborn", server=True)
    pid = run.wait_for_job()
    before = time.monotonic()
    run.interrupt()
    time.sleep(0.5)
    run.interrupt()
    code, out, err = run.end(30)
    assert time.monotonic() - before < 14  # 8 for the job, then this process; after one Ctrl-C it is 18
    assert code == 130
    (line,) = said(out + err)
    assert line.startswith("stopped in plan at 120 of 500 steps, killed before it could save that; to continue: ")
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("mode", "helps", "exit_code"),
    [("crash", "to continue where it stopped: ", 1), ("config", "once that is fixed", 2)],
)
def test_a_failure_is_said_once(terminal, mode, helps, exit_code):
    run = terminal(mode, server=True)
    code, out, err = run.end(120)
    assert code == exit_code
    assert (out + err).count("no luck today") == 1
    assert (out + err).count("--run r1") == 1
    assert helps in err


RUN = uuid4()


class FakeApi:
    """As much of Prefect's client as the demo uses: a run that trains until it is cancelled."""

    def __init__(self):
        self.states = []
        self.looks = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read_deployment_by_name(self, name):
        return SimpleNamespace(id=1)

    def create_flow_run_from_deployment(self, *_, **__):
        return SimpleNamespace(id=RUN)

    def read_flow_run(self, flow_run_id):
        self.looks += 1
        if self.looks == 2:
            raise KeyboardInterrupt
        return SimpleNamespace(state=Cancelled() if self.states else Running())

    def read_task_runs(self, **_):
        return [SimpleNamespace(name="plan", state=Completed()), SimpleNamespace(name="align", state=Running())]

    def set_flow_run_state(self, flow_run_id, state):
        self.states.append((flow_run_id, state.type))


def test_ctrl_c_in_the_demo_cancels_the_run(tmp_path, monkeypatch):
    store = open_store(StoreRef(uri=str(tmp_path / "store")))
    with run_lease(store, "r1", tmp_path) as lease:
        point(store, "r1", "align", "align", "d1", lease)
    (tmp_path / "work/products/align/d1").mkdir(parents=True)
    (tmp_path / "work/products/align/d1/progress.json").write_text('{"done": 12, "total": 50, "unit": "steps"}')
    api, out = FakeApi(), StringIO()
    monkeypatch.setattr(demo, "deploy", lambda: None)
    monkeypatch.setattr(demo, "get_client", lambda **_: api)
    monkeypatch.setattr(demo, "_LOOK_SECONDS", 0)
    settings = resolve_settings(
        store=str(tmp_path / "store"), work=str(tmp_path / "work"), tracking="none",
        environment={"RADLADS_HOME": str(tmp_path)},
    )  # fmt: skip
    running = {"prefect": services.Service("prefect", 1, 0, "http://127.0.0.1:9", "log")}
    assert demo.run_demo(Console(file=out), running, settings, "smoke", "r1", {}, "radlads demo --run r1") == 130
    assert api.states == [(RUN, "CANCELLING")]
    assert out.getvalue().splitlines()[-1] == "stopped in align at 12/50 steps; to continue: radlads demo --run r1"


def test_the_command_is_quoted():
    options = [("--run", "r1"), ("--set", "a=[1, 2]"), ("--store", None), ("--tracking", "http://x/?a&b")]
    line = command_line("run", "my recipe.yaml", options=options)
    assert line == "radlads run 'my recipe.yaml' --run r1 --set 'a=[1, 2]' --tracking 'http://x/?a&b'"


def test_the_demo_tells_of_progress_away_from_a_terminal(tmp_path, monkeypatch):
    (tmp_path / "progress.json").write_text('{"done": 12, "total": 50, "unit": "steps"}')
    now = [100.0]
    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    out = StringIO()
    view = demo._View(Console(file=out))
    for seconds in (0, 1, demo._SAY_SECONDS - 2, 1, 1):
        now[0] += seconds
        view.show("align", "Running", tmp_path)
    assert out.getvalue().splitlines() == ["align: running (12/50 steps)"] * 2
    view.show("align", "Completed", tmp_path)
    assert out.getvalue().splitlines()[2:] == ["align: completed (12/50 steps)"]


def test_the_quick_demo_is_the_smoke_recipe_with_less():
    from radlads.flows.cli.demo import quick_changes

    recipe, quick = load_recipe("smoke"), load_recipe("smoke", quick_changes())
    assert quick.training_stages == ("align", "distill")
    assert quick.datasets_used == ("stories",)
    assert quick.needle is None
    assert sum(getattr(quick, s).tokens for s in quick.training_stages) * 6 < sum(
        getattr(recipe, s).tokens for s in recipe.training_stages
    )
    done = CliRunner().invoke(cli.app, ["demo", "--quick", "--recipe", "tiny-qwen3-8b-hybrid"])
    assert "--quick shortens the smoke recipe" in str(done.exception)
