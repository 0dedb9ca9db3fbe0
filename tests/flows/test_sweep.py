"""A sweep over stand-ins for jobs: what is shared, what fails, what goes on, the table, and MLflow's tree."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from typer.testing import CliRunner

from radlads.flows import cli, sweep_deployments
from radlads.flows.common import ENDINGS
from radlads.flows.convert import radlads
from radlads.flows.sweep import SweepFailed, radlads_sweep
from radlads.flows.sweep_deployments import check_deployment, run_deployed
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.launchers.stopping import REQUEST, RunStopped, StopRequest
from radlads.tasks.sweep import tracked
from radlads.tasks.sweep.tracked import TrackedSweep

pytestmark = pytest.mark.usefixtures("prefect_server")
RATE, TOKENS = "distill.mixer_rate.start", "distill.tokens"
GRID = {RATE: [1e-5, 3e-5], TOKENS: [4096, 8192]}
MEMBERS = [f"s1-mixer_rate.start_{rate}-tokens_{tokens}" for rate in ("1e-05", "3e-05") for tokens in (4096, 8192)]
FINAL = {"distill.mixer_rate.final": 1e-5}


@pytest.fixture(autouse=True)
def judged(jobs):
    """The more tokens at the higher rate, the better; as evaluate's numbers would say it."""

    def scores(spec):
        distilled = jobs.specs["distill"].spec["section"]
        return {"kl": 1e-2 / distilled["mixer_rate"]["start"] / distilled["tokens"], "seconds": 36.0}

    jobs.metrics["evaluate"] = scores


def table_of(places):
    return json.loads(Path(places["store"], "sweeps/s1/table.json").read_text())


def test_a_grid_over_distill_makes_one_align(recipe, places, jobs, caplog):
    with caplog.at_level(logging.INFO, "prefect.radlads"):
        ended = radlads_sweep(recipe, "s1", GRID, FINAL, **places)
    assert ended == dict.fromkeys(MEMBERS, "done")
    assert dict(jobs.launched) == {
        "plan": 4, "tokenize": 1, "transplant": 1, "align": 1, "distill": 4, "finetune": 4, "evaluate": 4, "needle": 4,
        "publish": 4,
    }  # fmt: skip
    assert jobs.order[:5] == [*["plan"] * 4, "tokenize"], "nothing but plans before it is announced"
    said = [record.getMessage() for record in caplog.records if record.name == "prefect.radlads"]
    assert said[:8] == [
        "tokenize train: one for all 4 members: new",
        "transplant: one for all 4 members: new",
        "align: one for all 4 members: new",
        "distill: 4, one a member: new",
        "finetune: 4, one a member: new",
        "evaluate: 4, one a member: new",
        "needle: 4, one a member: new",
        "publish: 4, one a member: new",
    ]
    assert said[8] == "in all: 4 members, 0 reused, 0 continued, 23 new"
    assert said[9] == f"run 1 of 4: {MEMBERS[0]}"
    rows = table_of(places)["rows"]
    assert [row["member"] for row in rows] == MEMBERS
    assert [row["best"] for row in rows] == [[], [], [], ["KL"]]
    assert rows[3]["hours"] == pytest.approx(0.01)
    jobs.launched.clear()
    assert radlads_sweep(recipe, "s1", GRID, FINAL, **places) == ended
    assert not jobs.launched


def test_each_run_is_shown_by_the_orchestrator(recipe, places, jobs):
    state = radlads_sweep(recipe, "s1", {TOKENS: [4096, 8192]}, **places, return_state=True)
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [state.state_details.flow_run_id]}))
        runs = [client.read_flow_run(task.state.state_details.child_flow_run_id) for task in tasks]
    assert sorted(run.name for run in runs) == ["s1-tokens_4096", "s1-tokens_8192"]
    assert all(run.state.is_completed() for run in runs)


def test_one_failure_is_a_row_and_the_same_command_goes_on(recipe, places, jobs, monkeypatch):
    monkeypatch.setenv("RADLADS_RETRIES", "0")
    jobs.failures["distill"] = ["config"]
    state = radlads_sweep(recipe, "s1", GRID, FINAL, **places, return_state=True)
    assert state.is_failed()
    failed = state.result(raise_on_failure=False)
    assert isinstance(failed, SweepFailed)
    assert list(failed.failures) == MEMBERS[:1]
    assert state.message == f"1 of 4 runs of the sweep failed: {MEMBERS[0]}"
    assert [row["status"] for row in table_of(places)["rows"]] == ["failed", "done", "done", "done"]
    assert "no luck with distill" in table_of(places)["rows"][0]["reason"]
    assert (jobs.launched["align"], jobs.launched["distill"]) == (1, 4)
    jobs.launched.clear()
    assert radlads_sweep(recipe, "s1", GRID, FINAL, **places) == dict.fromkeys(MEMBERS, "done")
    assert dict(jobs.launched) == {"distill": 1, "finetune": 1, "evaluate": 1, "needle": 1, "publish": 1}
    assert [row["reason"] for row in table_of(places)["rows"]] == [""] * 4


def test_ctrl_c_is_a_request_between_two_members_too(recipe, places, jobs, monkeypatch):
    running = []
    begin = TrackedSweep.begin
    monkeypatch.setattr(TrackedSweep, "begin", lambda *args: (running.append(REQUEST.running), begin(*args)))
    radlads_sweep(recipe, "s1", {TOKENS: [4096, 8192]}, {"finetune": None, "needle": None}, **places)
    assert running == [True, True]
    assert not REQUEST.running


def test_stop_on_failure_starts_nothing_more(recipe, places, jobs):
    jobs.failures["align"] = ["config"]
    state = radlads_sweep(recipe, "s1", GRID, FINAL, **places, stop_on_failure=True, return_state=True)
    assert list(state.result(raise_on_failure=False).failures) == MEMBERS[:1]
    assert jobs.launched["align"] == 1
    assert [row["status"] for row in table_of(places)["rows"]] == ["failed", *["not started"] * 3]


def test_what_a_plan_refuses_fails_before_anything_is_launched(recipe, places, jobs):
    jobs.failures["plan"] = ["config"]
    state = radlads_sweep(recipe, "s1", {TOKENS: [4096, 8192]}, **places, return_state=True)
    assert state.message == "1 of 2 runs of the sweep failed: s1-tokens_4096"
    assert jobs.order[:3] == ["plan", "plan", "tokenize"]
    assert [row["status"] for row in table_of(places)["rows"]] == ["failed", "done"]
    assert jobs.launched["distill"] == 1


def test_a_plan_that_crashed_is_tried_again_in_its_turn(recipe, places, jobs):
    jobs.failures["plan"] = ["crash"]
    assert radlads_sweep(recipe, "s1", {TOKENS: [4096, 8192]}, **places) == {
        "s1-tokens_4096": "done", "s1-tokens_8192": "done",
    }  # fmt: skip
    assert jobs.launched["plan"] == 3


def test_values_can_be_added_and_nothing_else(recipe, places, jobs):
    radlads_sweep(recipe, "s1", {TOKENS: [4096]}, **places)
    jobs.launched.clear()
    radlads_sweep(recipe, "s1", {TOKENS: [2048, 4096]}, **places)
    assert (jobs.launched["distill"], jobs.launched["align"], jobs.launched["plan"]) == (1, 0, 1)
    state = radlads_sweep(recipe, "s1", {TOKENS: [2048]}, **places, return_state=True)
    assert "values can be added, and 4096 is missing" in state.message
    assert [row["member"] for row in table_of(places)["rows"]] == ["s1-tokens_2048", "s1-tokens_4096"]


def test_mlflow_has_one_run_above_all(recipe, places, jobs, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    jobs.failures["needle"] = ["config"]
    radlads_sweep(recipe, "s1", {TOKENS: [4096, 8192]}, **places | {"tracking": uri}, return_state=True)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id

    def runs(query):
        return {run.info.run_name: run for run in client.search_runs([experiment], query)}

    (parent,) = runs("tags.`radlads.kind` = 'sweep'").values()
    assert (parent.info.run_name, parent.info.status) == ("s1", "FAILED")
    assert parent.data.params == {f"grid.{TOKENS}": "4096, 8192"}
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["table.md"]
    children = runs(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {name: run.data.params[TOKENS] for name, run in children.items()} == {
        "s1-tokens_4096": "4096", "s1-tokens_8192": "8192",
    }  # fmt: skip
    assert children["s1-tokens_8192"].data.metrics["evaluate/kl"] == pytest.approx(1e-2 / 1e-5 / 8192)
    assert [run.info.status for _, run in sorted(children.items())] == ["FAILED", "FINISHED"]
    stages = runs(f"tags.`mlflow.parentRunId` = '{children['s1-tokens_8192'].info.run_id}'")
    assert {f"s1-tokens_8192 / {stage}" for stage in ("plan", "distill", "evaluate")} <= set(stages)
    assert "s1-tokens_8192 / align" not in stages, "the first member made it"
    assert "radlads.reused.align" in children["s1-tokens_8192"].data.tags

    radlads_sweep(recipe, "s1", {TOKENS: [4096, 8192]}, **places | {"tracking": uri})
    assert runs("tags.`radlads.kind` = 'sweep'")["s1"].info.status == "FINISHED"
    assert len(runs("tags.`radlads.kind` = 'pipeline'")) == 2


def test_what_an_outage_kept_from_mlflow_is_there_at_the_end(recipe, places, jobs, tmp_path, monkeypatch):
    opened = tracked.open_sweep_run
    away = lambda *args, **more: opened(*args, **more) if jobs.launched else None  # noqa: E731
    monkeypatch.setattr(tracked, "open_sweep_run", away)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    radlads_sweep(recipe, "s1", {TOKENS: [4096, 8192]}, {"needle": None}, **places | {"tracking": uri})
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    (parent,) = [run for run in found if run.data.tags["radlads.kind"] == "sweep"]
    parents = [r.data.tags["mlflow.parentRunId"] for r in found if r.data.tags["radlads.kind"] == "pipeline"]
    assert parents == [parent.info.run_id] * 2
    assert parent.info.status == "FINISHED"


def test_a_run_that_was_there_is_taken_under_the_sweep(recipe, places, jobs, tmp_path):
    tracking = places | {"tracking": f"sqlite:///{tmp_path}/mlflow.db"}
    radlads(recipe, run="s1-tokens_4096", overrides={TOKENS: 4096}, **tracking)
    radlads_sweep(recipe, "s1", {TOKENS: [4096]}, **tracking)
    client = MlflowClient(tracking["tracking"])
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`radlads.kind` = 'sweep'")
    (child,) = client.search_runs([experiment], "tags.`radlads.kind` = 'pipeline'")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert jobs.launched["plan"] == jobs.launched["publish"] == 1


def test_the_command_prints_the_table_and_says_that_a_run_failed(recipe, places, jobs, monkeypatch):
    monkeypatch.setattr(ENDINGS, "by_caller", False)
    jobs.failures["distill"] = ["config"]
    options = [word for name, place in places.items() for word in (f"--{name}", place)]
    asked = ["sweep", recipe, "--grid", f"{TOKENS}=4096,8192", "--set", "needle=null", "--run", "s1", *options]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].split() == "| run | tokens | status | KL | hours |".split()
    assert lines[2].startswith("| s1-tokens_4096 | 4096   | failed: distill")
    assert lines[3].startswith("| s1-tokens_8192 | 8192   | done ")
    (said,) = [line for line in result.stderr.splitlines() if "to continue" in line]
    assert said.startswith("1 of 2 runs of the sweep failed: s1-tokens_4096; to continue: radlads sweep ")
    printed = CliRunner().invoke(cli.app, ["sweep", "--table", "s1", "--store", places["store"]])
    assert printed.exit_code == 0
    assert printed.stdout.splitlines() == lines
    again = CliRunner().invoke(cli.app, asked)
    assert again.exit_code == 0, again.stderr
    assert again.stdout.count("| done ") == 2


@pytest.fixture
def deployment():
    """The id of `radlads/full`, which nobody serves; gone afterwards."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name(radlads.name)
        made = client.create_deployment(flow_id=flow_id, name="full")
        yield made
        client.delete_deployment(made)


class Worker:
    """Takes what is submitted and runs all of it at once, each in a thread; a process of its own is not what matters
    here."""

    def __init__(self, deployment, runs):
        self.found = {}
        self._wanted = FlowRunFilter(deployment_id={"any_": [deployment]})
        self._pool = ThreadPoolExecutor(runs)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=copy_context().run, args=[self._serve])

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self._pool.shutdown()

    def _serve(self):
        with get_client(sync_client=True) as client:
            while not self._ended.wait(0.2):
                for run in client.read_flow_runs(flow_run_filter=self._wanted):
                    if run.id not in self.found and run.state.is_scheduled():
                        self.found[run.id] = run
                        asked = {"flow_run": run, "parameters": run.parameters, "return_type": "state"}
                        self._pool.submit(copy_context().run, run_flow, radlads, **asked)


def test_deployment_runs_at_once_share_through_the_products_lease(recipe, places, jobs, deployment, monkeypatch):
    monkeypatch.setitem(jobs.metrics, "evaluate", lambda _: {"kl": 0.5})
    assert check_deployment("radlads") == deployment
    jobs.failures["evaluate"] = ["config"]
    with Worker(deployment, 4) as worker:
        state = radlads_sweep(recipe, "s1", GRID, FINAL, **places, deployments=True, return_state=True)
        failed = state.result(raise_on_failure=False).failures
        assert len(failed) == 1
        assert "no luck with evaluate" in next(iter(failed.values()))
        assert (jobs.launched["align"], jobs.launched["distill"], jobs.launched["tokenize"]) == (1, 4, 1)
        assert jobs.order[:4] == ["plan"] * 4
        assert jobs.launched["plan"] == 4
        assert sorted(run.parameters["run"] for run in worker.found.values()) == MEMBERS
        assert {tag for run in worker.found.values() for tag in run.tags} >= {"sweep:s1"}
        assert radlads_sweep(recipe, "s1", GRID, FINAL, **places, deployments=True) == dict.fromkeys(MEMBERS, "done")
    assert jobs.launched["distill"] == 4


def test_what_was_submitted_is_waited_for_and_stopped_with_the_sweep(deployment, monkeypatch):
    asked = {name: {"recipe": "smoke", "run": name} for name in ("s2-a", "s2-b")}
    request = StopRequest()
    request.ask()
    with get_client(sync_client=True) as client:
        mine = client.create_flow_run_from_deployment(deployment, name="s2-a", tags=["sweep:s2"])
        other = client.create_flow_run_from_deployment(deployment, name="s2-a", tags=["sweep:other"])
        monkeypatch.setattr(sweep_deployments, "REQUEST", request)
        with pytest.raises(RunStopped):
            run_deployed("radlads", asked, lambda _: None, lambda *_: False, sweep="s2")
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id={"any_": [deployment]}))
        assert sorted(run.name for run in runs) == ["s2-a", "s2-a", "s2-b"], "what was submitted is not again"
        assert {run.id for run in runs if run.state.is_cancelled()} == {run.id for run in runs} - {other.id}
        assert mine.id in {run.id for run in runs}


def test_nothing_deployed_is_said_in_one_line():
    with get_client(sync_client=True) as client, pytest.raises(ObjectNotFound):
        client.read_deployment_by_name("radlads/full")
    with pytest.raises(UserError, match=r"has no deployment radlads/full; in the project's folder: prefect --no-pr"):
        check_deployment("radlads")
