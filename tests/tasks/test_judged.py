"""The models of a run that an evaluation reads: which they are, and that the collector leaves them alone meanwhile."""

import threading

import pytest

from radlads.tasks import pipeline as pipelines
from radlads.tasks import stage
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.locks.lease import product_lease
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.contracts.store.pointers import read_pointers
from radlads.tasks.graph import judge
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.mirror import kept_stages
from radlads.tasks.pipeline import finished_students, open_pipeline, students_to_judge
from radlads.tasks.plain_runner import PlainRunner
from radlads.tasks.upkeep.gc import Wish, collect, find_garbage

from .test_graph import MemoryLauncher, places, plainly  # noqa: F401

CHAIN = ["transplant", "align", "distill", "finetune"]


@pytest.fixture
def launcher():
    return MemoryLauncher()


@pytest.fixture
def made(places, launcher):  # noqa: F811
    """The products of run `r`, every stage of the recipe `smoke`."""
    return plainly("smoke", places, launcher)[1]


@pytest.fixture
def evaluation(made, places, launcher):  # noqa: F811
    """A run at work that evaluates the models of `r`."""
    with open_pipeline("smoke", run="again", run_id="again", launcher=launcher, **places) as pipeline:
        yield pipeline


def keys(store, products):
    return {store.key(product.uri) for product in products}


def test_models_that_an_evaluation_reads_are_not_garbage(evaluation, made, places, launcher, tmp_path):  # noqa: F811
    store = evaluation.store
    students = students_to_judge(evaluation, "r")
    assert list(students) == CHAIN
    plainly("smoke", places, launcher, **{"align.tokens": 1 << 20})
    models = keys(store, students.values())
    for wish in (Wish(history=False), Wish(runs=["again"]), Wish(runs=[])):
        garbage = {one.product.key for one in find_garbage(store, wish)}
        assert garbage
        assert not garbage & models, wish
    list(collect(store, Wish(runs=["again"]), tmp_path))
    judged = judge(evaluation.recipe, PlainRunner(evaluation), students)
    assert set(judged) == {"evaluate", "needle"}
    assert all(store.read_manifest(key) is not None for key in models)


def test_only_the_collector_sees_the_models_of_another_run(evaluation, made):
    students = students_to_judge(evaluation, "r")
    assert not read_pointers(evaluation.store, "again")
    assert list(read_pointers(evaluation.store, "again", "judged")) == sorted(students)
    assert list(kept_stages(evaluation.store, "again")) == []
    with pytest.raises(UserError, match="no finished model of a run 'again'"):
        finished_students(evaluation.store, "again")


@pytest.mark.parametrize("deleted", [False, True])
def test_an_evaluation_waits_for_a_collector_that_was_first(evaluation, made, deleted, tmp_path, monkeypatch):
    store, waiting = evaluation.store, threading.Event()
    key = store.key(made["distill"].uri)
    monkeypatch.setattr(stage, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(pipelines.REQUEST, "check", waiting.set)

    def finish():
        assert waiting.wait(20)
        if deleted:
            store.delete(key, keep=[f"{key}/lease.json"])
        lease.__exit__(None, None, None)

    lease = product_lease(store, "distill", made["distill"].manifest.digest, tmp_path, deleting=True)
    lease.__enter__()
    collector = threading.Thread(target=finish)
    collector.start()
    try:
        if deleted:
            with pytest.raises(UserError, match="'distill' of the run 'r' was deleted in the meantime"):
                students_to_judge(evaluation, "r")
        else:
            assert list(students_to_judge(evaluation, "r")) == CHAIN
    finally:
        collector.join()


def stop_in_distill(places, launcher):  # noqa: F811
    """Run `r` again with another distill, which makes no product."""
    launcher.endings["distill"] = [JobCrashed("no luck")]
    with pytest.raises(JobCrashed):
        plainly("smoke", places, launcher, **{"distill.tokens": 1 << 20})


def test_a_model_is_judged_with_those_it_was_made_from(made, places, launcher):  # noqa: F811
    """The pointer of distill has moved on to a product that does not exist; finetune was made from the one before."""
    stop_in_distill(places, launcher)
    store = open_store(StoreRef(uri=places["store"]))
    found = finished_students(store, "r")
    assert {name: product.uri for name, product in found.items()} == {name: made[name].uri for name in CHAIN}


def test_a_model_that_is_gone_is_not_judged_and_that_is_said(made, places, launcher, tmp_path, caplog):  # noqa: F811
    stop_in_distill(places, launcher)
    store = open_store(StoreRef(uri=places["store"]))
    list(collect(store, Wish(history=False), tmp_path))
    assert list(finished_students(store, "r")) == ["finetune"]
    digest = made["distill"].manifest.digest[:12]
    assert f"the model {digest}, from which 'finetune' of the run 'r' was made, is no longer in" in caplog.text
