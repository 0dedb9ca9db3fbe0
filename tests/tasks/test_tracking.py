"""MLflow runs are found again, never duplicated; an outage neither slows nor fails anything and is made up for."""

import json
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient

from radlads.tasks.contracts import metrics_record
from radlads.tasks.contracts.events import Event
from radlads.tasks.contracts.job import CodeVersion, Manifest, StoreRef, TrackingRef
from radlads.tasks.contracts.metrics_record import catch_up
from radlads.tasks.contracts.store.open import LocalStore, store_id
from radlads.tasks.contracts.tracking import (
    MetricsRecord,
    RunIdentity,
    close_run,
    log_file,
    open_pipeline_run,
    open_stage_run,
)
from radlads.tasks.mirrored.products import mirror_product

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def ref(uri, request):
    return open_pipeline_run(uri, "recipe", RunIdentity(store="s", run=request.node.name))


def history(ref, key):
    found = MlflowClient(ref.uri).get_metric_history(ref.run_id, key)
    return [(metric.step, metric.value) for metric in sorted(found, key=lambda metric: metric.step)]


def test_a_retry_finds_its_runs_again(uri):
    one = RunIdentity(store="s", run="run-1")
    parent = open_pipeline_run(uri, "recipe", one, params={"recipe": {"align": {"tokens": 5}}})
    child = open_stage_run(parent, "run-1", "align", "d1", params={"tokens": 5, "none": None})
    close_run(child, "FAILED")
    close_run(parent, "FAILED")
    again = open_pipeline_run(uri, "recipe", one, params={"recipe": {"align": {"tokens": 6}}})
    assert again == parent
    assert open_stage_run(again, "run-1", "align", "d1", params={"tokens": 6}) == child
    assert open_stage_run(again, "run-1", "align", "d2") != child
    assert open_pipeline_run(uri, "recipe", RunIdentity(store="s", run="run-2")) != parent
    client = MlflowClient(uri)
    run = client.get_run(child.run_id)
    assert (run.info.run_name, run.info.status) == ("run-1 / align", "RUNNING")
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.params == {"tokens": "5"}
    assert client.get_run(parent.run_id).data.params == {"recipe.align.tokens": "5"}
    assert open_stage_run(again, "run-1", "align", "d1", params={"tokens": 7, "other": 1}) == child
    assert client.get_run(child.run_id).data.params == {"tokens": "5", "other": "1"}


def test_stores_that_share_a_server_do_not_share_runs(uri):
    runs = [open_pipeline_run(uri, "recipe", RunIdentity(store=store, run="run-3")) for store in ("s", "t", "s")]
    assert runs[0] == runs[2] != runs[1]


def test_a_store_is_known_wherever_it_is(tmp_path):
    first, second = (LocalStore(StoreRef(uri=str(tmp_path / name))) for name in ("one", "two"))
    assert store_id(first) == store_id(first) != store_id(second)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert store_id(LocalStore(StoreRef(uri=str(tmp_path / "moved")))) == store_id(first)


def test_numbers_of_a_product_are_shown_once(uri, ref):
    def product(loss, at):
        return Manifest(
            stage="align", digest="d", spec={}, files=(), metrics={"loss": loss, "table": [1, 2]},
            code=CodeVersion(sha=None, versions={}), created_at=datetime.fromtimestamp(at, UTC),
        )  # fmt: skip

    stage = open_stage_run(ref, "run", "align", "d")
    for loss, at in ((0.5, 100), (0.5, 100), (0.5, 200), (0.25, 300)):
        assert mirror_product(ref, stage, "align", "/store/align", product(loss, at))
    assert history(ref, "align/loss") == [(0, 0.5), (1, 0.25)]


def test_rows_reach_file_and_mlflow(tmp_path, ref):
    record = MetricsRecord(tmp_path / "metrics.jsonl", ref)
    for step in range(1, 601):
        record.log(step, {"loss": 1 / step, "layer_00": float("nan") if step == 2 else step})
    record.log(600, {"heldout_loss": 0.5})
    record.log(600, {"loss": 99.0})
    record.params({"parameters": 10})
    record.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 601
    assert rows[1]["layer_00"] is None
    assert history(ref, "loss") == [(step, 1 / step) for step in range(1, 601)]
    assert len(history(ref, "layer_00")) == 599
    assert history(ref, "heldout_loss") == [(600, 0.5)]
    assert MlflowClient(ref.uri).get_run(ref.run_id).data.params["parameters"] == "10"


def test_resumed_job_logs_no_step_twice(tmp_path, ref):
    path = tmp_path / "metrics.jsonl"
    record = MetricsRecord(path, ref)
    for step in range(1, 8):
        record.log(step, {"loss": float(step)})
    record.close()
    with path.open("a") as stream:
        stream.write('{"step": 8, "lo')  # kill -9 in the middle of a line
    record = MetricsRecord(path, ref)
    record.rewind(5)
    assert [row["step"] for row in record.rows()] == [1, 2, 3, 4, 5]
    for step in range(6, 11):
        record.log(step, {"loss": float(step)})
    record.close()
    assert [row["step"] for row in MetricsRecord(path, None).rows()] == list(range(1, 11))
    assert history(ref, "loss") == [(step, float(step)) for step in range(1, 11)]


def test_resume_on_another_machine_with_the_record_lost(tmp_path, ref):
    for folder, first in (("one", 1), ("two", 4)):
        record = MetricsRecord(tmp_path / folder / "metrics.jsonl", ref)
        for step in range(first, 7):
            record.log(step, {"loss": float(step)})
        record.close()
    assert history(ref, "loss") == [(step, float(step)) for step in range(1, 7)]


def test_outage_is_neither_slow_nor_fatal(tmp_path):
    nowhere = TrackingRef(uri=NOWHERE, experiment="x", run_id="0" * 32)
    record = MetricsRecord(tmp_path / "metrics.jsonl", nowhere)
    began = time.monotonic()
    for step in range(200):
        record.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    record.close(timeout_seconds=0.1)
    assert time.monotonic() - began < 2.0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200


def test_no_run_without_a_server():
    assert open_pipeline_run(NOWHERE, "recipe", RunIdentity(store="s", run="run")) is None
    assert not close_run(TrackingRef(uri=NOWHERE, experiment="x", run_id="0" * 32), "FAILED")
    assert close_run(None, "FAILED")


def test_mlflow_is_caught_up_after_an_outage(tmp_path, ref, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(metrics_record, "connect", lambda uri: (_ for _ in ()).throw(ConnectionError("down")))
        record = MetricsRecord(path, ref)
        for step in range(1, 5):
            record.log(step, {"loss": float(step)})
        record.params({"late": True})
        picture = tmp_path / "needle.png"
        picture.write_bytes(b"png")
        record.artifact(picture)
        record.close(timeout_seconds=5)
    assert history(ref, "loss") == []
    for _ in range(2):
        assert catch_up(path, ref)
    assert history(ref, "loss") == [(step, float(step)) for step in range(1, 5)]
    client = MlflowClient(ref.uri)
    assert client.get_run(ref.run_id).data.params["late"] == "True"
    assert [item.path for item in client.list_artifacts(ref.run_id)] == ["needle.png"]


def test_no_step_is_sent_twice_when_an_answer_was_lost(tmp_path, ref, monkeypatch):
    """The rows arrived, the answer did not; then the job went back and computed other numbers for the same steps."""
    path = tmp_path / "metrics.jsonl"
    real = MlflowClient.log_batch

    def deaf(self, run_id, *arguments, **named):
        real(self, run_id, *arguments, **named)
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", deaf)
        record = MetricsRecord(path, ref)
        for step in range(1, 8):
            record.log(step, {"loss": float(step)})
        record.close(timeout_seconds=5)
    record = MetricsRecord(path, ref)
    record.rewind(5)
    for step in range(6, 11):
        record.log(step, {"loss": step + 0.5})
    record.close()
    assert [step for step, _ in history(ref, "loss")] == list(range(1, 11))


def test_a_folder_whose_name_has_a_space(tmp_path):
    folder = tmp_path / "my checkout é"
    folder.mkdir()
    made = open_pipeline_run(f"sqlite:///{folder}/mlflow.db", "recipe", RunIdentity(store="s", run="r"))
    log_file(made, "report.md", b"hello")
    assert [path.name for path in folder.rglob("report.md")] == ["report.md"]


def test_server_comes_back_while_the_job_runs(tmp_path, ref, monkeypatch):
    real, calls, back = metrics_record.connect, [], threading.Event()

    def flaky(uri):
        calls.append(uri)
        if len(calls) < 3:
            raise ConnectionError("down")
        back.set()
        return real(uri)

    monkeypatch.setattr(metrics_record, "connect", flaky)
    monkeypatch.setattr(metrics_record, "_FLUSH_SECONDS", 0.01)
    record = MetricsRecord(tmp_path / "metrics.jsonl", ref)
    record.log(1, {"loss": 1.0})
    record.log(2, {"loss": 2.0})
    assert back.wait(20)
    record.close()
    assert history(ref, "loss") == [(1, 1.0), (2, 2.0)]


def test_no_mirror(tmp_path):
    record = MetricsRecord(tmp_path / "a" / "metrics.jsonl", None)
    record.log(0, {"loss": 1.0})
    record.close()
    assert catch_up(tmp_path / "none" / "metrics.jsonl", TrackingRef(uri=NOWHERE, experiment="x", run_id="r"))


ROLLED_BACK = Event(
    kind="loss_spike", step=4, first=4, action="rollback", to=2, number="loss", value=9.0, threshold=3.0, median=2.0,
    spread=0.1,
)  # fmt: skip


def test_mlflow_gets_every_step_of_a_name_once_and_the_events(tmp_path, ref):
    """Also from a process that knows nothing of what was sent before."""

    def log(record: MetricsRecord, *steps: int) -> None:
        for step in steps:
            record.log(step, {"loss": float(len(record.rows()) * 100 + step)})

    first = MetricsRecord(tmp_path / "metrics.jsonl", ref)
    log(first, 1, 2, 3, 4)
    first.close()
    second = MetricsRecord(tmp_path / "metrics.jsonl", ref)
    second.event(ROLLED_BACK)
    second.rewind(2)
    log(second, 3, 4)
    second.close()
    third = MetricsRecord(tmp_path / "metrics.jsonl", ref)
    log(third, 5)
    third.close()
    client = MlflowClient(ref.uri)
    for _ in range(2):
        histories = {
            name: sorted(metric.step for metric in client.get_metric_history(ref.run_id, name))
            for name in client.get_run(ref.run_id).data.metrics
        }
        assert histories == {"loss": [1, 2, 3, 4, 5], "rollback-1/loss": [3, 4]}
        assert client.get_run(ref.run_id).data.tags["radlads.events"] == (
            "1: step 4: loss spike: loss 9, threshold 3 (median before 2, spread 0.1); rolled back to step 2"
        )
        path = client.download_artifacts(ref.run_id, "events.json", str(tmp_path))
        assert json.loads(Path(path).read_text()) == {"events": [ROLLED_BACK.model_dump(mode="json")]}
        assert catch_up(tmp_path / "metrics.jsonl", ref)
    repeated = client.get_metric_history(ref.run_id, "rollback-1/loss")
    rows = [row for row in third.rows() if row["step"] in (3, 4) and "loss" in row]
    assert sorted(metric.value for metric in repeated) == [row["loss"] for row in rows]


def test_an_outage_amid_a_rollback_is_made_up_for(tmp_path, ref, monkeypatch):
    record = MetricsRecord(tmp_path / "metrics.jsonl", None)
    for step in (1, 2, 3):
        record.log(step, {"loss": float(step)})
    record.event(ROLLED_BACK.model_copy(update={"step": 3, "to": 1}))
    record.rewind(1)
    for step in (2, 3, 4):
        record.log(step, {"loss": float(step)})
    record.close()
    sent = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
    assert not catch_up(tmp_path / "metrics.jsonl", ref)
    monkeypatch.setattr(MlflowClient, "log_batch", sent)
    assert catch_up(tmp_path / "metrics.jsonl", ref)
    metrics = MlflowClient(ref.uri).get_run(ref.run_id).data.metrics
    assert metrics == {"loss": 4.0, "rollback-1/loss": 3.0}
