"""What a user types and is told. Nothing here starts Prefect."""

import socket
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from radlads.flows import cli, services
from radlads.flows.demo import read_progress, scratch_of
from radlads.flows.services import Service
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.locks.lease import run_lease
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.contracts.store.pointers import point

RUNNER = CliRunner()


def typed(*arguments, home):
    command = [sys.executable, "-m", "radlads.flows.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=home)


def test_recipes_are_listed():
    result = RUNNER.invoke(cli.app, ["recipes"])
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith("demo-teacher The") for line in lines)
    assert any(line.startswith("qwen3-8b-hybrid * Our") for line in lines)
    assert not any(line.startswith("tiny-") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nonsense"], "error: no recipe named 'nonsense'"),
        (["plan", "nonsense.yaml"], "error: no recipe file at nonsense.yaml"),
        (["demo", "--recipe", "demo-teacher", "--set", "pretrain.tokens=-1"], "pretrain.tokens"),
        (["run", "demo-teacher", "--set", "tokens"], "write it as KEY=VALUE"),
        (["evaluate", "nobody", "--recipe", "nonsense"], "error: no recipe named 'nonsense'"),
        (["evaluate", "../nobody", "--recipe", "smoke"], "'../nobody' cannot be a run's name"),
        (["sweep"], "error: name a recipe, e.g. radlads sweep smoke --grid"),
        (["sweep", "smoke"], "error: a sweep needs at least one --grid KEY=VALUE,VALUE"),
        (["sweep", "smoke", "--grid", "distill.tokenz=1,2"], "unknown key 'tokenz'; did you mean 'tokens'?"),
        (["sweep", "smoke", "--grid", "distill.tokens=1e6", "--run", "a/b"], "'a/b' cannot be a run's name"),
        (["sweep", "smoke", "--table", "first"], "error: --table prints the table of an existing sweep"),
        (["sync", ""], "'' cannot be a run's name"),
        (
            ["run", "smoke", "--store", "/dev/null/store", "--tracking", "none"],
            "the store /dev/null/store: a part of this path is a file",
        ),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, words):
    began = time.monotonic()
    result = typed(*arguments, home=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert time.monotonic() - began < 30  # a second on an idle machine: nothing heavy is imported
    assert not (tmp_path / ".radlads").exists()


def test_overrides():
    pairs = ["a.b=1", "rate=1e-3", "tokens=2e6", "layers=[1, 3]", "stage=null", "name=smoke", "text=a=b", "on=true"]
    assert cli.parse_overrides(pairs) == {
        "a.b": 1, "rate": 0.001, "tokens": 2_000_000, "layers": [1, 3], "stage": None, "name": "smoke",
        "text": "a=b", "on": True,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"--set a: not valid YAML"):
        cli.parse_overrides(["a=[1"])


def test_status_when_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RADLADS_HOME", str(tmp_path))
    assert RUNNER.invoke(cli.app, ["services", "status"]).exit_code == 1
    result = RUNNER.invoke(cli.app, ["services", "down"])
    assert "nothing was running" in result.stdout


def test_a_process_is_known_by_its_start_and_stopped_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "_STOP_SECONDS", 0.2)
    process = subprocess.Popen(["sh", "-c", "sleep 1000 & echo started; wait"], stdout=subprocess.PIPE)
    process.stdout.readline()
    child = psutil.Process(process.pid).children()[0]
    started = psutil.Process(process.pid).create_time()
    service = Service("worker", process.pid, started, None, "log")
    other = Service("mlflow", process.pid, started - 100, "http://127.0.0.1:9", "log")
    services._write(tmp_path, {"worker": service, "mlflow": other})
    assert services.read_services(tmp_path) == {"worker": service}
    assert services.is_healthy(service)
    assert not services.is_healthy(other)
    assert services.services_down(tmp_path) == ["worker"]
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
    assert services.read_services(tmp_path) == {}


def test_settings_point_at_what_runs():
    running = {
        "prefect": Service("prefect", 1, 0, "http://127.0.0.1:4201", "log"),
        "mlflow": Service("mlflow", 1, 0, "http://127.0.0.1:5001", "log"),
    }
    found = services.service_settings(running, None)
    assert found["PREFECT_API_URL"] == "http://127.0.0.1:4201/api"
    assert found["RADLADS_TRACKING"] == "http://127.0.0.1:5001"
    found = services.service_settings(running, "radlads:word")
    assert found["PREFECT_API_AUTH_STRING"] == "radlads:word"
    assert found["RADLADS_TRACKING"] == "http://radlads:word@127.0.0.1:5001"


def test_a_service_that_does_not_start_says_why(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('port taken')"]
    service = services._start(tmp_path, "mlflow", command, "http://127.0.0.1:9", services._environment(tmp_path))
    with pytest.raises(UserError, match="port taken"):
        services._wait_until_healthy(service, 20)


def test_a_taken_port_is_not_used():
    first = services._free_port(42733)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert services._free_port(first) != first


def test_progress_in_words(tmp_path):
    assert read_progress(tmp_path) == (0.0, 0.0, "")
    (tmp_path / "progress.json").write_text('{"done": 1200, "total": 2000, "unit": "steps"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.23456}\n')
    assert read_progress(tmp_path) == (1200, 2000, "1,200/2,000 steps, loss 1.235")
    store, work = open_store(StoreRef(uri=str(tmp_path / "store"))), tmp_path / "work"
    assert scratch_of(store, work, "r1", "tokenize train") == work, "before anything was asked for"
    with run_lease(store, "r1", work) as lease:
        point(store, "r1", "tokenize-train", "tokenize", "abc", lease)
    assert scratch_of(store, work, "r1", "tokenize train") == work / "products" / "tokenize" / "abc"
