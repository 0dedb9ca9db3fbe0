"""Weights & Biases gets the same record as MLflow; a missing package is one line, its faults are no one's."""

import importlib.util
import sys
import threading
from datetime import UTC, datetime
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import CodeVersion, Manifest, StoreRef
from radlads.tasks.contracts.metrics_record import MetricsRecord, catch_up
from radlads.tasks.contracts.mirrors import weights_biases
from radlads.tasks.contracts.mirrors.weights_biases import WandbMirror, wandb_ref
from radlads.tasks.contracts.settings import resolve_settings
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.contracts.tracking import close_run, log_file, open_stage_run
from radlads.tasks.mirror import sync_run
from radlads.tasks.mirrored import weights_biases as shown


class Run:
    """What of a run of wandb is used."""

    def __init__(self, **asked):
        self.asked, self.rows, self.summary, self.axes, self.finished = asked, [], {}, {}, False

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="wandb/__init__.py")
    module.runs = []
    module.Settings = dict
    module.init = lambda **asked: module.runs.append(Run(**asked)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(weights_biases, "_reported", set())
    monkeypatch.setattr(shown, "_shown", {})
    return module


@pytest.fixture
def parent(tmp_path):
    return wandb_ref("wandb:team/students", str(tmp_path / "wandb"), "recipe", "mine", "store", "mine")


def test_the_address(wandb, monkeypatch, tmp_path):
    for uri in ("wandb:students", "wandb:team/students"):
        assert resolve_settings(tracking=uri).tracking == uri
    for uri in ("wandb:", "wandb:a/b/c", "wandb://x", "wandb:a b"):
        with pytest.raises(UserError, match="write W&B as wandb:PROJECT") as caught:
            resolve_settings(tracking=uri)
        assert len(str(caught.value).splitlines()) == 1
    monkeypatch.delitem(sys.modules, "wandb")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(UserError, match=r"not installed: pip install 'radlads\[wandb\]'"):
        resolve_settings(tracking="wandb:students")


def test_rows_of_a_job_arrive_with_both_axes(wandb, parent, tmp_path):
    ref = open_stage_run(parent, "mine", "distill", "d1")
    assert ref == open_stage_run(parent, "mine", "distill", "d1")
    assert ref.run_id != open_stage_run(parent, "mine", "distill", "d2").run_id
    record = MetricsRecord(tmp_path / "metrics.jsonl", ref)
    for step in (1, 2, 3):
        record.log(step, {"loss": 1 / step, "tokens": 512.0 * step})
    record.close()
    (run,) = wandb.runs
    assert run.finished
    asked = {key: run.asked[key] for key in ("entity", "project", "name", "group", "job_type", "resume")}
    assert asked == {"entity": "team", "project": "students", "name": "mine / distill", "group": "mine",
                     "job_type": "distill", "resume": "allow"}  # fmt: skip
    assert (run.axes["*"], run.axes["by_tokens/*"]) == ("step", "tokens")
    assert [row["loss"] for _, row in run.rows] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [(row["step"], row["tokens"], row["by_tokens/loss"]) for _, row in run.rows][1] == (2, 1024.0, 0.5)
    again = WandbMirror(tmp_path / "metrics.jsonl", ref, threading.Lock())
    second = Run()
    again.send(second)
    assert second.rows == run.rows, "the same numbers, which W&B does not take twice"
    assert catch_up(tmp_path / "metrics.jsonl", ref)


def test_what_a_stage_made_is_in_both_summaries(wandb, parent):
    for stage, metrics in (("align", {"gpu_hours": 1.0}), ("evaluate", {"kl": 0.25, "gpu_hours": 0.5})):
        manifest = Manifest(
            stage=stage, digest=f"d-{stage}", spec={}, files=(), metrics=metrics,
            code=CodeVersion(sha=None, versions={}), created_at=datetime.now(UTC),
        )  # fmt: skip
        ref = open_stage_run(parent, "mine", stage, manifest.digest)
        assert shown.show_product(
            parent, ref, stage, f"/store/{stage}", manifest, {"variant": "v"}, {"align.tokens": 5}
        )
    *_, stage, above = wandb.runs
    assert stage.summary["kl"] == 0.25
    assert stage.summary["product/uri"] == "/store/evaluate"
    assert stage.asked["config"] == {"align.tokens": 5}
    assert above.asked["config"] == {"variant": "v"}
    assert (above.asked["name"], above.asked["job_type"]) == ("mine", "pipeline")
    assert (above.summary["final/kl"], above.summary["total/gpu_hours"]) == (0.25, 1.5)


def test_no_fault_of_it_fails_a_job(wandb, parent, tmp_path):
    def broken(**_):
        raise RuntimeError("no route to wandb://me:opensesame@host")

    wandb.init = broken
    record = MetricsRecord(tmp_path / "metrics.jsonl", open_stage_run(parent, "mine", "align", "d"))
    record.log(1, {"loss": 1.0})
    record.close()
    assert len(record.path.read_text().splitlines()) == 1
    assert close_run(parent, "FINISHED")
    log_file(parent, "report.md", b"x")
    with pytest.raises(UserError, match="wandb sync"):
        sync_run(LocalStore(StoreRef(uri=str(tmp_path / "store"))), "wandb:students", "mine")


def test_the_package_itself_offline(parent, tmp_path, monkeypatch):
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:
        pytest.skip("wandb is not installed (pip install 'radlads[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(weights_biases, "_reported", set())
    for first in (1, 3):
        record = MetricsRecord(tmp_path / "metrics.jsonl", open_stage_run(parent, "mine", "align", "d"))
        record.log(first, {"loss": 1.0, "tokens": 10.0})
        record.close(60)
    assert not weights_biases._reported
    kept = list((tmp_path / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 2
    assert all(path.stat().st_size > 100 for path in kept)
