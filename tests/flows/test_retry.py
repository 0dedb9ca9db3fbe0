"""A retried flow run re-enters the flow: what is committed is not made again, what failed is."""

import asyncio

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from radlads.flows.common import ENDINGS
from radlads.flows.convert import radlads
from radlads.tasks import stage_tasks

pytestmark = pytest.mark.usefixtures("prefect_server")


def retry(flow_run_id, parameters):
    """What `prefect flow-run retry` does, and a worker after it."""

    async def schedule():
        async with get_client() as client:
            await client.set_flow_run_state(flow_run_id, Scheduled(message="Retried"), force=True)
            return await client.read_flow_run(flow_run_id)

    flow_run = asyncio.run(schedule())
    return run_flow(radlads, flow_run=flow_run, parameters=parameters, return_type="state")


def arguments(recipe, places):
    return {"recipe": recipe, "run": None, "overrides": None, **places}


def test_only_what_failed_runs_again(recipe, places, jobs, monkeypatch):
    monkeypatch.setenv("RADLADS_RETRIES", "0")
    jobs.failures["distill"] = ["crash"]
    state = radlads(**arguments(recipe, places), return_state=True)
    assert state.is_failed()
    assert "distill crashed: no luck with distill" in state.message
    assert "distill is working" in state.message
    assert jobs.launched["finetune"] == 0

    again = retry(state.state_details.flow_run_id, arguments(recipe, places))
    assert again.is_completed(), again.message
    assert jobs.launched["plan"] == jobs.launched["align"] == jobs.launched["tokenize"] == 1
    assert jobs.launched["distill"] == 2
    assert jobs.launched["publish"] == 1
    assert again.result()["run"] == f"tiny-{str(state.state_details.flow_run_id)[:8]}"


def test_a_crash_is_tried_again_by_itself(recipe, places, jobs, monkeypatch):
    monkeypatch.setenv("RADLADS_RETRIES", "1")
    monkeypatch.setattr(align_task(), "retry_delay_seconds", 0)
    jobs.failures["align"] = ["preempted"]
    state = radlads(**arguments(recipe, places), return_state=True)
    assert state.is_completed(), state.message
    assert jobs.launched["align"] == 2


def test_a_crash_is_not_tried_for_ever(recipe, places, jobs, monkeypatch):
    monkeypatch.setenv("RADLADS_RETRIES", "2")
    monkeypatch.setattr(align_task(), "retry_delay_seconds", 0)
    jobs.failures["align"] = ["crash"] * 9
    state = radlads(**arguments(recipe, places), return_state=True)
    assert state.is_failed()
    assert jobs.launched["align"] == 3


def test_each_failure_is_said_once(recipe, places, jobs, monkeypatch, caplog):
    monkeypatch.setenv("RADLADS_RETRIES", "1")
    monkeypatch.setattr(align_task(), "retry_delay_seconds", 0)
    monkeypatch.setattr(ENDINGS, "_said", set())
    jobs.failures["align"] = ["crash", "out-of-memory"]
    state = radlads(**arguments(recipe, places), return_state=True)
    assert state.is_failed()
    said = [record.getMessage() for record in caplog.records if "no luck with align" in record.getMessage()]
    assert [line.splitlines()[0] for line in said] == [
        "align crashed: no luck with align", "Finished in state Failed('align: no luck with align')",
    ]  # fmt: skip
    assert said[0].splitlines()[-1].startswith("trying again ")


@pytest.mark.parametrize("reason", ["config", "out-of-memory", "nonfinite"])
def test_what_a_retry_cannot_mend_is_not_tried_again(recipe, places, jobs, monkeypatch, reason):
    monkeypatch.setenv("RADLADS_RETRIES", "5")
    jobs.failures["align"] = [reason]
    state = radlads(**arguments(recipe, places), return_state=True)
    assert state.message == "align: no luck with align"
    assert jobs.launched["align"] == 1


def align_task():
    return stage_tasks.task_of("align").task


def test_retries_wait_a_little():
    assert align_task().retry_delay_seconds == stage_tasks._RETRY_SECONDS > 0
