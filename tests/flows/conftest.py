"""Prefect without a deployment, and jobs without work: the one seam that is faked is run_process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.settings import (
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY,
    temporary_settings,
)
from prefect.testing.utilities import prefect_test_harness

from radlads.tasks.contracts.identity import readings
from radlads.tasks.contracts.job import CodeVersion, JobSpec, Manifest
from radlads.tasks.contracts.recipe.choice import AttentionChoice
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.specs import GgufFile, Pin, PlanReport, TeacherRef
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.launchers import local as launch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # for composed
TRAINING = {"tokens": 4096, "context": 64, "batch": 4, "micro_batch": 2}
RECIPE = {
    "name": "tiny",
    "teacher": {"path": "demo"},
    "student": {"attention_layers": [1]},
    "data": {
        "train": {"sources": [{"kind": "files", "paths": ["corpus.txt"]}]},
        "unused": {"sources": [{"kind": "files", "paths": ["corpus.txt"]}]},
    },
    "align": TRAINING,
    "distill": TRAINING,
    "finetune": TRAINING,
    "evaluate": {},
    "needle": {"lengths": [64]},
}


@pytest.fixture(scope="session")
def prefect_server():
    with (
        temporary_settings(
            {PREFECT_SERVER_ANALYTICS_ENABLED: False, PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY: timedelta(seconds=1)}
        ),
        prefect_test_harness(server_startup_timeout=180),
    ):
        yield


@dataclass(frozen=True)
class RunningServices:
    """Prefect's server, its worker and MLflow, as `radlads services up` starts them in `home`, and what that said."""

    home: Path
    said: str

    @property
    def urls(self) -> dict[str, str]:
        """Name → where it answers; none for the worker."""
        return {name: one["url"] for name, one in json.loads((self.home / "services.json").read_text()).items()}

    @property
    def password(self) -> str:
        return (self.home / "services-password").read_text().strip()

    @property
    def user(self) -> tuple[str, ...]:
        """Name and secret."""
        return tuple(self.password.split(":"))

    def api(self) -> httpx.Client:
        """Prefect's, for the user."""
        url = f"{self.urls['prefect']}/api"
        return httpx.Client(base_url=url, auth=self.user, trust_env=False, timeout=60, transport=Patient())


class Patient(httpx.HTTPTransport):
    """Asks again while the server says 503, as Prefect's own client does: its database was locked for too long."""

    def handle_request(self, request):
        for _ in range(20):
            answer = super().handle_request(request)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            answer.close()
            time.sleep(1)
        return answer


def typed(*command, home, **more):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "RADLADS_"))}
    env |= {"RADLADS_HOME": str(home), **more}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    """Started once for all tests of them, with variables of other services around; crashed stages are not retried."""
    home = tmp_path_factory.mktemp("services") / "home"
    radlads = [sys.executable, "-m", "radlads.flows.cli", "services"]
    stale = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_API_AUTH_STRING": "radlads:of-other-services"}
    quick = {"PREFECT_WORKER_QUERY_SECONDS": "1", "RADLADS_RETRIES": "0"}
    try:
        done = typed(*radlads, "up", home=home, **stale, **quick)
        assert done.returncode == 0, done.stderr
        yield RunningServices(home, done.stdout + done.stderr)
    finally:
        typed(*radlads, "down", home=home)


@pytest.fixture(scope="session")
def deployed(running):
    """What the shell block of docs/convert.md says, after which a person can start runs in the page."""
    script = f"""
        set -e
        eval "$({sys.executable} -m radlads.flows.cli services env)"
        {sys.executable} -m prefect --no-prompt deploy --all
        echo "$PREFECT_API_URL"
    """
    done = typed("bash", "-c", script, home=running.home)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@dataclass
class FakeJobs:
    """Stands in for run_process: commits a small product for any stage, and counts what was launched.

    failures: stage → how its next attempts end, e.g. {"distill": ["config", "crash"]}.
    """

    launched: Counter = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    specs: dict[str, JobSpec] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    """Location in the recipe → what the next plan finds there."""
    teacher: str = "f"
    """Fingerprint of the teacher that the next plan sees."""
    dollars: dict[str, float] = field(default_factory=dict)
    """Stage → its cost by the next plan."""
    metrics: dict[str, Callable[[JobSpec], dict]] = field(default_factory=dict)
    """Stage → the numbers of its product."""

    def __call__(self, command, *, env, cwd, log, on_tick, grace_seconds):
        spec = JobSpec.model_validate_json(Path(command[-1]).read_text())
        self.launched[spec.stage] += 1
        self.order.append(spec.stage)
        self.specs[spec.stage] = spec
        scratch = Path(spec.scratch)
        with log.open("a") as stream:
            stream.write(f"{spec.stage} is working\n")
        (scratch / "progress.json").write_text('{"done": 1, "total": 2, "unit": "steps"}')
        (scratch / "metrics.jsonl").write_text('{"step": 1, "time": 1, "loss": 0.5}\n')
        on_tick()
        if self.failures.get(spec.stage):
            reason = self.failures[spec.stage].pop(0)
            (scratch / "exit.json").write_text(json.dumps({"reason": reason, "message": f"no luck with {spec.stage}"}))
            return 1
        output = scratch / "output"
        for name, data in product_files(spec, self.teacher, self.contents, self.dollars).items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        store = open_store(spec.store)
        metrics = self.metrics[spec.stage](spec) if spec.stage in self.metrics else {"loss": 0.25}
        manifest = Manifest(
            stage=spec.stage, digest=spec.digest, inputs=spec.inputs, spec=spec.spec, files=(),
            metrics=metrics, code=CodeVersion(sha=None, versions={}), created_at=datetime.now(UTC),
            mlflow_run_id=spec.tracking.run_id if spec.tracking else None, run=spec.run,
        )  # fmt: skip
        store.commit(store.key(spec.output_uri), output, manifest)
        (scratch / "exit.json").write_text('{"reason": "done", "message": ""}')
        return 0


def product_files(spec, fingerprint="f", contents=None, dollars=None):
    if spec.stage == "plan":
        teacher = TeacherRef(path="demo", fingerprint=fingerprint, tokenizer_fingerprint="t")
        student = parse_recipe(spec.spec["recipe"]).student
        late = isinstance(student.attention_layers, AttentionChoice) and student.attention_layers.after_align
        pins = {
            reading.location: Pin(
                kind=reading.kind,
                place=reading.place,
                content=(contents or {}).get(reading.location, f"content of {reading.location}"),
            )
            for reading in readings(parse_recipe(spec.spec["recipe"]))
        }
        path = (spec.spec["recipe"].get("teacher") or {}).get("path", "")
        kept = GgufFile(name="x.gguf", sha256=fingerprint, kinds={"Q4_1": 1}, dtype="bfloat16")
        report = PlanReport(
            teacher=None if spec.spec["recipe"].get("pretrain") else teacher,
            gguf=kept if path.endswith(".gguf") else None,
            tokenizer="demo", tokenizer_fingerprint="t", pins=pins, teacher_parameters=10, student_parameters=12,
            mixer_parameters=3, num_layers=2,
            attention_layers=() if late else (1,), choice=student.attention_layers if late else None,
            stages={"align": {
                "tokens": 4096, "steps": 16, "context": 64, "batch": 4, "seconds": None, "memory_bytes_per_gpu": {},
            }} | {stage: {"dollars": cost, "gpu_hours": cost / 2} for stage, cost in (dollars or {}).items()},
        )  # fmt: skip
        return {"plan.json": report.model_dump_json().encode()}
    if spec.stage == "choose":
        return {"model/config.json": b"{}", "choose.json": b"{}", "choose.png": b"\x89PNG"}
    if spec.stage == "needle":
        return {"needle.json": b"{}", "needle.png": b"\x89PNG"}
    if spec.stage == "publish":
        return {"report.md": b"# Report", "report.html": b"<h1>Report</h1>", "model/config.json": b"{}"}
    if spec.stage == "tokenize":
        return {"index.json": b"{}"}
    return {"model/config.json": b"{}", f"{spec.stage}.json": b"{}"}


@pytest.fixture
def jobs(monkeypatch):
    fake = FakeJobs()
    monkeypatch.setattr(launch, "run_process", fake)
    return fake


@pytest.fixture
def recipe(tmp_path):
    """Path of a recipe that has every stage, and a corpus beside it."""
    path = tmp_path / "recipe" / "tiny.yaml"
    path.parent.mkdir()
    (path.parent / "corpus.txt").write_text("once upon a time")
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Arguments that keep everything in the test's folder."""
    monkeypatch.setenv("RADLADS_HOME", str(tmp_path / "home"))
    return {"store": str(tmp_path / "store"), "tracking": "none", "work": str(tmp_path / "work")}
