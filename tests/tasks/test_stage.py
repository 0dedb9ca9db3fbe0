"""run_stage: what is committed is returned, what is not is launched, what is wrong is said."""

import contextlib
import json
import shutil
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from radlads.tasks import stage
from radlads.tasks.contracts.job import CodeVersion, JobResources, JobSpec, Manifest, StoreRef
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.specs import PlanSpec
from radlads.tasks.contracts.store.open import CorruptArtifact, LocalStore
from radlads.tasks.launchers import local as launch
from radlads.tasks.launchers.local import JobCrashed
from radlads.tasks.stage import StageRequest, run_stage

RECIPE = {
    "name": "tiny", "teacher": {"path": "demo"},
    "data": {"train": {"sources": [{"kind": "files", "paths": ["a.txt"]}]}},
}  # fmt: skip


@pytest.fixture
def ask(tmp_path):
    """Makes the request for a plan of a recipe."""
    store = LocalStore(StoreRef(uri=str(tmp_path / "store")))

    def make(**changes):
        return StageRequest(
            stage="plan", run="r", recipe="tiny", spec=PlanSpec(recipe=parse_recipe(RECIPE | changes)), inputs={},
            store=store, work=tmp_path / "work",
            resources=JobResources(device="cpu", processes=1, threads=1),
        )  # fmt: skip

    return make


@pytest.fixture
def job(monkeypatch):
    """Replaces the job's process; its attributes say what the job does."""

    class Fake:
        runs, code, ending, commits = 0, 0, {"reason": "done", "message": ""}, True
        digest: str | None = None

        def __call__(self, command, *, env, cwd, log, on_tick, grace_seconds):
            self.runs += 1
            spec = JobSpec.model_validate_json(Path(command[-1]).read_text())
            scratch = Path(spec.scratch)
            with log.open("a") as stream:
                stream.write("working\n")
            (scratch / "output").mkdir(exist_ok=True)
            (scratch / "output" / "plan.json").write_text("{}")
            if self.commits:
                store = LocalStore(spec.store)
                manifest = Manifest(
                    stage=spec.stage, digest=self.digest or spec.digest, spec=spec.spec, files=(),
                    code=CodeVersion(sha=None, versions={}), created_at=datetime.now(UTC),
                )  # fmt: skip
                store.commit(store.key(spec.output_uri), scratch / "output", manifest)
            if self.ending:
                (scratch / "exit.json").write_text(json.dumps(self.ending))
            return self.code

    fake = Fake()
    monkeypatch.setattr(launch, "run_process", fake)
    return fake


def test_a_stage_is_made_once(ask, job):
    first = run_stage(ask())
    again = run_stage(ask())
    assert (first.reused, again.reused, job.runs) == (False, True, 1)
    assert again.manifest == first.manifest
    assert again.ref.digest == ask().digest


def test_no_tracking_and_no_slot_for_what_is_committed(ask, job):
    run_stage(ask())

    @contextlib.contextmanager
    def slot():
        pytest.fail("waited for a slot")
        yield

    run_stage(ask(), open_tracking=lambda digest: pytest.fail("opened a run"), slot=slot())


def test_another_setting_is_another_product_and_both_stay(ask, job):
    first, other = run_stage(ask()), run_stage(ask(student={"attention_layers": [1]}))
    assert first.uri != other.uri
    assert job.runs == 2
    assert run_stage(ask()).reused
    assert job.runs == 2


def test_exit_zero_without_a_manifest_is_a_failure(ask, job):
    job.commits = False
    with pytest.raises(JobCrashed, match="committed nothing"):
        run_stage(ask())


def test_a_manifest_of_something_else_is_a_failure(ask, job):
    job.digest = "other"
    with pytest.raises(CorruptArtifact, match="does not belong there"):
        run_stage(ask())


def test_a_manifest_without_a_good_end_is_found_by_the_next_attempt(ask, job):
    job.code, job.ending = 247, None
    with pytest.raises(JobCrashed, match="SIGKILL"):
        run_stage(ask())
    assert run_stage(ask()).reused


def test_a_committed_product_that_lost_a_file(ask, job):
    product = run_stage(ask())
    Path(product.uri, "plan.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"plan\.json is missing"):
        run_stage(ask())


def test_papers_are_kept_and_the_scratch_is_cleared(ask, job, tmp_path):
    job.code, job.ending, job.commits = 1, {"reason": "crash", "message": "boom"}, False
    with pytest.raises(JobCrashed):
        run_stage(ask())
    store = ask().store
    assert store.get_bytes(f"{ask().key}/job/exit.json") == b'{"reason": "crash", "message": "boom"}'
    assert (ask().scratch / "output").is_dir(), "a retry goes on from what is there"
    job.code, job.ending, job.commits = 0, {"reason": "done", "message": ""}, True
    run_stage(ask())
    assert store.get_bytes(f"{ask().key}/job/log.txt").count(b"=== attempt") == 2
    assert not (ask().scratch / "output").exists()


def test_the_record_follows_to_another_machine(ask, job, tmp_path):
    store = ask().store
    store.put_bytes(f"{ask().key}/job/metrics.jsonl", b'{"step": 1, "time": 1, "loss": 1.0}\n')
    run_stage(ask())
    assert b'"step": 1' in (ask().scratch / "metrics.jsonl").read_bytes()


def test_checkpoints_go_once_the_product_is_committed_and_stay_while_it_is_not(ask, job):
    store, kept = ask().store, f"{ask().key}/checkpoints/step-000005/state.safetensors"
    store.put_bytes(kept, b"moments")
    job.commits = False
    with pytest.raises(JobCrashed):
        run_stage(ask())
    assert store.get_bytes(kept) == b"moments"
    job.commits = True
    product = run_stage(ask())
    assert store.list(f"{ask().key}/checkpoints") == []
    assert store.read_manifest(ask().key) == product.manifest


def test_what_a_flow_left_that_died_right_after_the_commit_goes_when_the_stage_is_reused(
    ask, job, tmp_path, monkeypatch
):
    """Between the job's commit and the flow's tidying: optimizer states in the store, full scratch, papers not kept."""
    store = ask().store
    store.put_bytes(f"{ask().key}/checkpoints/step-000005/state.safetensors", b"moments")
    store.put_bytes(f"{ask().key}/checkpoints/latest", b"step-000005\n")
    store.put_bytes(f"{ask().key}/job/metrics.jsonl", b"")

    def died(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_keep_papers", died)
        with pytest.raises(KeyboardInterrupt):
            run_stage(ask())
    (ask().scratch / "metrics.jsonl").write_bytes(b'{"step": 1, "time": 1, "loss": 1.0}\n')
    assert (ask().scratch / "output").is_dir()
    assert run_stage(ask()).reused
    assert store.list(f"{ask().key}/checkpoints") == []
    assert store.get_bytes(f"{ask().key}/job/metrics.jsonl") == b'{"step": 1, "time": 1, "loss": 1.0}\n'
    assert b"=== attempt" in store.get_bytes(f"{ask().key}/job/log.txt")
    assert not (ask().scratch / "output").exists()


def test_the_scratch_of_another_store_is_left_alone_by_a_stage_that_is_reused(ask, job, tmp_path):
    run_stage(ask())
    other = ask()
    moved = LocalStore(StoreRef(uri=str(tmp_path / "copy")))
    shutil.copytree(tmp_path / "store", tmp_path / "copy", dirs_exist_ok=True)
    (ask().scratch / "output").mkdir()
    (ask().scratch / "log.txt").write_text("another store's")
    assert run_stage(replace(other, store=moved)).reused
    assert (ask().scratch / "output").exists()
    assert b"another store's" not in moved.get_bytes(f"{ask().key}/job/log.txt")


def test_a_dataset_that_another_process_is_making_is_waited_for(ask, job, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    run_job = launch.run_process

    def slow(*args, **kwargs):
        entered.set()
        assert leave.wait(30)
        return run_job(*args, **kwargs)

    monkeypatch.setattr(launch, "run_process", slow)
    made = []
    threads = [threading.Thread(target=lambda: made.append(run_stage(ask()))) for _ in range(2)]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    threading.Timer(0.5, leave.set).start()
    for thread in threads:
        thread.join(60)
    assert sorted(product.reused for product in made) == [False, True]
    assert job.runs == 1
