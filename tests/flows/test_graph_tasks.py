"""The flows run the graph that every other runner does: same stages, same inputs, same digests."""

import pytest

from radlads.flows.convert import radlads
from radlads.flows.pretrain import radlads_pretrain
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.stage_tasks import plan_task, task_of

from ..tasks.test_graph import recorded

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.mark.parametrize("name", ["smoke", "tiny-qwen3-8b-hybrid", "tiny-hrwkv7-reka-flash-3.1", "demo-teacher"])
def test_a_flow_runs_the_graph(name, places, jobs):
    flow = radlads_pretrain if name == "demo-teacher" else radlads
    made = flow(name, run="r", **places)
    expected = recorded(name)
    store = open_store(StoreRef(uri=places["store"]))
    labels = {uri: key if not key.endswith(" data") else f"tokenize {key[:-5]}" for key, uri in made.items()}
    manifests = {labels[uri]: store.read_manifest(store.key(uri)) for key, uri in made.items() if key != "run"}
    assert {label: {k: labels[ref.uri] for k, ref in one.inputs.items()} for label, one in manifests.items()} == dict(
        expected.steps
    )
    assert {label: one.digest for label, one in manifests.items()} == expected.digests
    side_by_side = ("evaluate", "needle")
    order = [label.split()[0] for label, _ in expected.steps if label not in side_by_side]
    assert [stage for stage in jobs.order if stage not in side_by_side] == order


def test_every_stage_is_a_task_of_its_own():
    """Prefect tells the runs of a flow apart by their task's key and a count."""
    tasks = [task_of(stage).task for stage in ("tokenize", "align", "distill", "publish")] + [plan_task.task]
    assert len({task.task_key for task in tasks}) == len(tasks)
    assert [task.name for task in tasks] == ["tokenize", "align", "distill", "publish", "plan"]
    assert task_of("align") is task_of("align")
