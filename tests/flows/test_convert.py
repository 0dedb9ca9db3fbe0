"""The flow over fake jobs: order, inputs, what is reused, what a user is told."""

import asyncio
import json
import time
from pathlib import Path

import boto3
import pytest
import yaml
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from radlads.flows.convert import radlads
from radlads.flows.evaluate import radlads_evaluate
from radlads.flows.pretrain import radlads_pretrain
from radlads.tasks.contracts import metrics_record, tracking
from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.contracts.store.pointers import read_pointers
from radlads.tasks.launchers import gpu_lock
from radlads.tasks.launchers import local as launch
from radlads.tasks.mirror import sync_run
from radlads.tasks.mirrored import inputs, products
from radlads.tasks.pipeline import finished_students

pytestmark = pytest.mark.usefixtures("prefect_server")
STAGES = ["plan", "tokenize", "transplant", "align", "distill", "finetune", "evaluate", "needle", "publish"]


def messages(state):
    return state.message.splitlines()


def test_a_whole_run(recipe, places, jobs, tmp_path):
    made = radlads(recipe, run="r1", **places)
    assert sorted(jobs.launched.elements()) == sorted(STAGES)
    assert jobs.order[:6] == STAGES[:6]
    assert jobs.order[-1] == "publish"
    inputs = {stage: set(spec.inputs) for stage, spec in jobs.specs.items()}
    assert inputs == {
        "plan": set(), "tokenize": set(), "transplant": set(),
        "align": {"data", "student"}, "distill": {"data", "student"}, "finetune": {"data", "student"},
        "evaluate": {"data", "student", "transplant", "align", "distill"}, "needle": {"distill", "student"},
        "publish": {"plan", "train data", "transplant", "align", "distill", "finetune", "evaluate", "needle"},
    }  # fmt: skip
    assert jobs.specs["distill"].inputs["student"].uri == made["align"]
    assert jobs.specs["needle"].inputs["student"].uri == made["finetune"]
    assert made["run"] == "r1"
    assert made["publish"] == f"{tmp_path}/store/products/publish/{jobs.specs['publish'].digest}"
    assert made["train data"].startswith(f"{tmp_path}/store/products/tokenize/")
    store = open_store(StoreRef(uri=places["store"]))
    pointed = {label: pointer.uri for label, pointer in read_pointers(store, "r1").items()}
    assert pointed.pop("tokenize-train") == made["train data"]
    assert pointed == {stage: uri for stage, uri in made.items() if stage not in ("run", "train data")}
    assert load_recipe(f"{tmp_path}/store/runs/r1/recipe.yaml").name == "tiny"
    corpus = jobs.specs["tokenize"].spec["dataset"]["sources"][0]["paths"]
    assert corpus == [f"{tmp_path}/recipe/corpus.txt"]
    papers = store.list(f"{store.key(made['align'])}/job")
    assert [key.rsplit("/", 1)[-1] for key in papers] == [
        "exit.json", "job.json", "log.txt", "metrics.jsonl", "progress.json",
    ]  # fmt: skip
    assert not (Path(jobs.specs["align"].scratch) / "output").exists()


def test_the_same_run_again_launches_nothing(recipe, places, jobs):
    first = radlads(recipe, run="r1", **places)
    jobs.launched.clear()
    assert radlads(recipe, run="r1", **places) == first
    assert not jobs.launched


def test_two_runs_share_what_is_the_same(recipe, places, jobs):
    """A sweep over distill costs one align; what follows distill is each run's own."""
    first = radlads(recipe, run="r1", **places)
    second = radlads(recipe, run="r2", overrides={"distill.tokens": 8192}, **places)
    assert dict(jobs.launched) == {
        "plan": 2, "tokenize": 1, "transplant": 1, "align": 1, "distill": 2, "finetune": 2, "evaluate": 2,
        "needle": 2, "publish": 2,
    }  # fmt: skip
    assert first["align"] == second["align"]
    assert jobs.specs["distill"].inputs["student"].uri == first["align"]


def test_another_name_makes_only_what_bears_the_name(recipe, places, jobs):
    """The plan is what a run found, the report has its name in its title; every model and every number is shared."""
    radlads(recipe, run="r1", **places)
    jobs.launched.clear()
    radlads(recipe, run="r2", **places)
    assert dict(jobs.launched) == {"plan": 1, "publish": 1}


def test_a_recipe_that_gains_a_section_makes_only_that(recipe, places, jobs):
    radlads(recipe, run="r1", overrides={"evaluate": None, "needle": None}, **places)
    jobs.launched.clear()
    radlads(recipe, run="r1", **places)
    assert dict(jobs.launched) == {"plan": 1, "evaluate": 1, "needle": 1, "publish": 1}
    jobs.launched.clear()
    radlads(recipe, run="r1", overrides={"needle.lengths": [64, 128]}, **places)
    assert dict(jobs.launched) == {"plan": 1, "needle": 1, "publish": 1}


@pytest.mark.parametrize(("way", "inputs"), [("recall", {"student", "data"}), ("difficulty", {"student"})])
def test_layers_chosen_after_align_are_what_the_rest_is_made_from(recipe, places, jobs, way, inputs):
    asked = {"student.attention_layers": {"count": 1, "choose": way}}
    made = radlads(recipe, run="r1", overrides=asked, **places)
    assert jobs.order[2:6] == ["transplant", "align", "choose", "distill"]
    assert jobs.specs["transplant"].spec["student"]["attention_layers"] == []
    assert set(jobs.specs["choose"].inputs) == inputs
    assert jobs.specs["choose"].inputs["student"].uri == made["align"]
    assert jobs.specs["choose"].spec["run_tokens"] == 3 * 4096
    assert jobs.specs["distill"].inputs["student"].uri == made["choose"]
    assert "choose" in jobs.specs["evaluate"].inputs
    assert jobs.specs["publish"].inputs["choose"].uri == made["choose"]
    jobs.launched.clear()
    assert radlads(recipe, run="r1", overrides=asked, **places) == made
    assert not jobs.launched


def test_a_choice_that_was_killed_is_made_again(recipe, places, jobs):
    jobs.failures["choose"] = ["config"]
    asked = {"student.attention_layers": {"count": 1, "choose": "recall"}}
    assert radlads(recipe, run="r1", overrides=asked, **places, return_state=True).is_failed()
    assert "distill" not in jobs.launched
    radlads(recipe, run="r1", overrides=asked, **places)
    assert (jobs.launched["align"], jobs.launched["choose"], jobs.launched["distill"]) == (1, 2, 1)


@pytest.mark.parametrize("way", ["even", "last"])
def test_layers_known_to_the_plan_are_transplanted(recipe, places, jobs, way):
    radlads(recipe, run="r1", overrides={"student.attention_layers": {"count": 1, "choose": way}}, **places)
    assert "choose" not in jobs.launched
    assert jobs.specs["transplant"].spec["student"]["attention_layers"] == [1]


def test_operational_settings_are_the_same_run(recipe, places, jobs, tmp_path):
    radlads(recipe, run="r1", **places)
    radlads(recipe, run="r1", overrides={"align.micro_batch": 1, "resources.threads": 1}, **places)
    assert jobs.launched["align"] == 1
    assert len(list((tmp_path / "store/runs/r1").glob("recipe-*.yaml"))) == 1


def test_a_plan_of_another_version_is_passed_over(recipe, places, jobs, tmp_path, caplog):
    """Its spec has a key that today's recipes do not know: the run is planned anew, and says so in one line."""
    radlads(recipe, run="r1", **places)
    manifest = tmp_path / "store" / "products" / "plan" / jobs.specs["plan"].digest / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["spec"]["recipe"]["key_of_long_ago"] = 1
    manifest.write_text(json.dumps(raw))
    jobs.launched.clear()
    radlads(recipe, run="r1", overrides={"needle.lengths": [128]}, **places)
    assert dict(jobs.launched) == {"plan": 1, "needle": 1, "publish": 1}
    assert "is of another version and is skipped: recipe.key_of_long_ago" in caplog.text


def test_another_setting_in_the_same_run_is_a_new_product_and_the_old_one_stays(recipe, places, jobs, tmp_path):
    first = radlads(recipe, run="r1", **places)
    jobs.launched.clear()
    changed = {"distill.tokens": 8192}
    second = radlads(recipe, run="r1", overrides=changed, **places)
    assert sorted(jobs.launched) == sorted(["plan", "distill", "finetune", "evaluate", "needle", "publish"])
    assert second["align"] == first["align"]
    store = open_store(StoreRef(uri=places["store"]))
    pointer = read_pointers(store, "r1")["distill"]
    assert [target.uri for target in pointer.targets] == [second["distill"], first["distill"]]
    assert store.read_manifest(store.key(first["distill"])) is not None
    assert load_recipe(f"{tmp_path}/store/runs/r1/recipe.yaml").distill.tokens == 8192, "what the run is made by now"
    assert len(list((tmp_path / "store/runs/r1").glob("recipe-*.yaml"))) == 1
    jobs.launched.clear()
    assert radlads(recipe, run="r1", **places) == first, "putting the recipe back costs nothing"
    assert not jobs.launched
    assert read_pointers(store, "r1")["distill"].uri == first["distill"]


def test_of_a_changed_run_the_newest_chain_of_models_is_judged(recipe, places, jobs):
    """A run whose align changed and that stopped in distill: models of other settings are not mixed in."""
    first = radlads(recipe, run="r1", **places)
    store = open_store(StoreRef(uri=places["store"]))
    assert list(finished_students(store, "r1")) == ["transplant", "align", "distill", "finetune"]
    jobs.failures["distill"] = ["config"]
    assert radlads(recipe, run="r1", overrides={"align.tokens": 8192}, **places, return_state=True).is_failed()
    found = finished_students(store, "r1")
    assert list(found) == ["transplant", "align"]
    assert found["align"].uri not in first.values()
    radlads(recipe, run="r1", overrides={"align": None}, **places)
    assert list(finished_students(store, "r1")) == ["transplant", "distill", "finetune"]


def test_absent_stages_are_left_out(recipe, places, jobs):
    missing = ["finetune", "evaluate", "needle"]
    made = radlads(recipe, run="r1", overrides=dict.fromkeys(missing), **places)
    assert not set(missing) & set(jobs.launched)
    assert jobs.specs["publish"].inputs["distill"].uri == made["distill"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": "nonsense"}, "no recipe named 'nonsense'"),
        ({"overrides": {"distil.tokens": 1}}, "did you mean 'distill'"),
        ({"overrides": {"align.tokens": -1}}, "align.tokens"),
        ({"run": "a/b"}, "cannot be a run's name"),
        ({"store": "gs://x"}, "neither s3://"),
        ({"tracking": "mlruns"}, "not an MLflow server"),
    ],
)
def test_bad_requests_end_at_once_in_one_line(recipe, places, jobs, change, words):
    arguments = {"recipe": recipe, "run": "r1", **places, **change}
    state = radlads(**arguments, return_state=True)
    assert state.is_failed()
    assert words in state.message
    assert len(messages(state)) == 1
    assert not jobs.launched


def test_a_default_name_comes_from_the_flow_run(recipe, places, jobs):
    state = radlads(recipe, **places, return_state=True)
    assert state.result()["run"] == f"tiny-{str(state.state_details.flow_run_id)[:8]}"


async def artifacts(key):
    async with get_client() as client:
        return await client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_what_a_person_sees(recipe, places, jobs):
    radlads(recipe, run="Seen_1", **places)
    found = {key: asyncio.run(artifacts(f"seen-1-{key}")) for key in ("plan", "report", "needle-heatmap")}
    assert '"stage": "align"' in found["plan"][0].data
    assert found["report"][0].data == "# Report"
    assert found["needle-heatmap"][0].data.startswith("data:image/png;base64,")
    assert asyncio.run(artifacts("seen-1-align-progress"))[0].data == 50.0


def test_mlflow_has_a_parent_and_a_child_for_every_stage(recipe, places, jobs, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        radlads(recipe, run="r1", **{**places, "tracking": uri})
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = {run.info.run_name: run for run in runs if run is not parent}
    children = {name.removeprefix("r1 / "): run for name, run in children.items()}
    assert sorted(children) == sorted(stage if stage != "tokenize" else "tokenize train" for stage in STAGES)
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in children.values())
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.params["align.tokens"] == "4096"
    for run in (parent, children["align"]):
        assert run.data.params["variant"] == "rad_rwkv7"
        assert run.data.params["teacher"] == "demo"
        assert run.data.params["layers"] == "1"
        assert run.data.params["align.optimizer.beta2"] == "0.95", "a default"
    assert children["tokenize train"].data.params["data.train.sources.0.kind"] == "files"
    assert parent.data.params["planned.student_parameters"] == "12"
    read = {one.dataset.name: one.tags[0].value for one in children["distill"].inputs.dataset_inputs}
    assert read == {"data": "tokens", "teacher: demo": "teacher"}
    made = client.search_logged_models([parent.info.experiment_id])
    models = {model.model_id: model.name for model in made}
    assert sorted(models.values()) == ["r1-align", "r1-distill", "r1-finetune", "r1-publish", "r1-transplant"]
    distill = client.get_run(children["distill"].info.run_id)
    assert [models[one.model_id] for one in distill.inputs.model_inputs] == ["r1-align"]
    (version,) = client.search_model_versions("name = 'tiny'")
    place = f"{tmp_path}/store/products/publish/{jobs.specs['publish'].digest}"
    assert (version.tags["radlads.uri"], version.tags["radlads.run"]) == (place, "r1")
    assert len(version.tags["radlads.sha256"]) == 64
    assert parent.data.metrics["distill/loss"] == 0.25
    assert children["align"].data.metrics["loss"] == 0.5
    place = f"{tmp_path}/store/products/align/{jobs.specs['align'].digest}"
    assert children["align"].data.tags["radlads.output_uri"] == place
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"needle.png", "report.md"}


def test_mlflow_links_what_another_run_made(recipe, places, jobs, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    made = radlads(recipe, run="r1", **{**places, "tracking": uri})
    for _ in range(2):
        radlads(recipe, run="r2", overrides={"distill.tokens": 8192}, **{**places, "tracking": uri})
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parents = {run.data.tags["radlads.run"]: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    align = [run for run in runs if run.info.run_name == "r1 / align"]
    assert [run.data.tags["mlflow.parentRunId"] for run in align] == [parents["r1"].info.run_id]
    tags = parents["r2"].data.tags
    assert tags["radlads.reused.align"] == made["align"]
    assert tags["radlads.reused.align.digest"] == jobs.specs["align"].digest
    assert tags["radlads.reused.align.run"] == "r1"
    assert tags["radlads.reused.align.mlflow_run_id"] == align[0].info.run_id
    assert "radlads.reused.tokenize-train" in tags
    assert "radlads.reused.distill" not in tags
    assert "align/loss" not in parents["r2"].data.metrics
    assert parents["r2"].data.metrics["distill/loss"] == 0.25
    sync_run(open_store(StoreRef(uri=places["store"])), uri, "r2")
    assert len([r for r in client.search_runs([align[0].info.experiment_id]) if r.info.run_name == "r1 / align"]) == 1


def test_a_dead_tracking_server_does_not_matter(recipe, places, jobs):
    assert radlads(recipe, run="r1", **{**places, "tracking": "http://127.0.0.1:9"})["run"] == "r1"
    assert jobs.specs["align"].tracking is None


def test_mlflow_is_caught_up_by_the_next_attempt(recipe, places, jobs, tmp_path):
    radlads(recipe, run="r1", **{**places, "tracking": "http://127.0.0.1:9"})
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        radlads(recipe, run="r1", **{**places, "tracking": uri})
    assert set(jobs.launched.values()) == {1}
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    align = [run for run in runs if run.info.run_name == "r1 / align"]
    assert len(align) == 1
    assert [metric.value for metric in client.get_metric_history(align[0].info.run_id, "loss")] == [0.5]
    assert "product.json" in {item.path for item in client.list_artifacts(align[0].info.run_id)}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def mlflow(database, monkeypatch):
    """A tracking database that can be away: (uri, away: a set that makes it so while it holds something)."""
    away = set()
    real = metrics_record.connect

    def connect(uri):
        if away:
            raise ConnectionError("down")
        return real(uri)

    monkeypatch.setattr(metrics_record, "connect", connect)
    for module in (tracking, inputs, products):
        monkeypatch.setattr(module, "connect", connect)
    return database, away


def curves(uri, name):
    """(stage, values of its curve, status) of every stage's run, and the statuses of the runs above them."""
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parents = {run.info.run_id: run.info.status for run in runs if run.data.tags.get("radlads.run") == name}
    found = [
        (
            run.info.run_name.removeprefix(f"{name} / "),
            [m.value for m in client.get_metric_history(run.info.run_id, "loss")],
            run.info.status,
        )
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") in parents
    ]
    return sorted(found), list(parents.values())


SHORT = dict.fromkeys(["distill", "finetune", "evaluate", "needle"])
WHOLE = sorted((stage, [0.5], "FINISHED") for stage in ["plan", "tokenize train", "transplant", "align", "publish"])


def goes_away_in(jobs, stage, away):
    """MLflow is gone once a stage's job is at work, and stays away."""
    real = jobs.__call__

    def run(command, **named):
        if JobSpec.model_validate_json(Path(command[-1]).read_text()).stage == stage:
            away.add(stage)
        return real(command, **named)

    return run


def test_an_outage_that_outlives_the_run_is_made_up_for_by_a_command(recipe, places, jobs, mlflow, monkeypatch):
    uri, away = mlflow
    monkeypatch.setattr(launch, "run_process", goes_away_in(jobs, "align", away))
    radlads(recipe, run="outlived", overrides=SHORT, **{**places, "tracking": uri})
    away.clear()
    stages, _ = curves(uri, "outlived")
    assert ("align", [], "RUNNING") in stages
    assert "publish" not in {name for name, *_ in stages}
    for _ in range(2):
        sync_run(open_store(StoreRef(uri=places["store"])), uri, "outlived")
        assert curves(uri, "outlived") == (WHOLE, ["FINISHED"])


def test_an_outage_that_ends_before_the_run_is_made_up_for_at_its_end(recipe, places, jobs, mlflow, monkeypatch):
    uri, away = mlflow
    real = goes_away_in(jobs, "align", away)

    def run(command, **named):
        if "/publish/" in command[-1]:
            away.clear()
        return real(command, **named)

    monkeypatch.setattr(launch, "run_process", run)
    radlads(recipe, run="ended", overrides=SHORT, **{**places, "tracking": uri})
    assert curves(uri, "ended") == (WHOLE, ["FINISHED"])


def test_a_failed_run_is_failed_and_a_finished_one_finished(recipe, places, jobs, mlflow, monkeypatch):
    uri, _ = mlflow
    monkeypatch.setenv("RADLADS_RETRIES", "0")
    jobs.failures["align"] = ["crash"]
    for made in (False, True):
        try:
            raise KeyError("somebody calls the flow while they handle an error")
        except KeyError:
            state = radlads(recipe, run="failed", overrides=SHORT, **{**places, "tracking": uri}, return_state=True)
        assert state.is_completed() == made
        stages, parents = curves(uri, "failed")
        assert parents == ["FINISHED" if made else "FAILED"]
        assert {name: status for name, _, status in stages}["align"] == ("FINISHED" if made else "FAILED")
    assert curves(uri, "failed")[0] == WHOLE


def test_who_loses_a_race_does_not_call_the_product_of_the_other_failed(recipe, places, jobs, mlflow, monkeypatch):
    """Two processes of one run: this one is ended after the other one has committed."""
    uri, _ = mlflow
    monkeypatch.setenv("RADLADS_RETRIES", "0")
    real = jobs.__call__

    def run(command, **named):
        code = real(command, **named)
        if "align" in command[-1] and jobs.launched["align"] == 1:
            (Path(command[-1]).parent / "exit.json").write_text('{"reason": "crash", "message": "ended"}')
        return code

    monkeypatch.setattr(launch, "run_process", run)
    assert radlads(recipe, run="raced", overrides=SHORT, **{**places, "tracking": uri}, return_state=True).is_failed()
    stages, parents = curves(uri, "raced")
    assert {name: status for name, _, status in stages}["align"] == "FINISHED"
    assert parents == ["FAILED"]


def test_the_same_run_in_another_store_has_a_curve_of_its_own(recipe, places, jobs, mlflow, tmp_path):
    uri, _ = mlflow
    for store in ("one", "two", "one"):
        radlads(recipe, run="shared", overrides=SHORT, **{**places, "store": str(tmp_path / store), "tracking": uri})
    stages, parents = curves(uri, "shared")
    assert stages == sorted(WHOLE * 2)
    assert parents == ["FINISHED"] * 2


def test_evaluate_and_needle_do_not_share_a_gpu(recipe, places, jobs, monkeypatch, tmp_path):
    """They are started together, and nobody made a concurrency limit for this server."""
    gpu = JobResources(device="cuda", processes=1, threads=1)
    monkeypatch.setattr(launch.LocalLauncher, "resources", lambda *_: gpu)
    monkeypatch.setattr(gpu_lock, "_PLACES", (tmp_path,))
    running, most = [], []

    def run(command, **named):
        running.append(command)
        most.append(len(running))
        time.sleep(0.7 if "evaluate" in command[-1] or "needle" in command[-1] else 0)
        code = jobs(command, **named)
        running.remove(command)
        return code

    monkeypatch.setattr(launch, "run_process", run)
    radlads(recipe, run="r1", overrides=dict.fromkeys(["align", "finetune"]), **places)
    assert {"evaluate", "needle"} <= set(jobs.launched)
    assert max(most) == 1


def test_judging_a_finished_run_again(recipe, places, jobs):
    first = radlads(recipe, run="r1", **places)
    jobs.launched.clear()
    made = radlads_evaluate("r1", recipe, run="again", overrides={"needle.lengths": [128]}, **places)
    assert dict(jobs.launched) == {"plan": 1, "needle": 1}, "the held-out loss is what it was"
    assert jobs.specs["needle"].inputs["student"].uri == first["finetune"]
    store = open_store(StoreRef(uri=places["store"]))
    assert read_pointers(store, "again")["needle"].uri == made["needle"]
    read = {stage: pointer.uri for stage, pointer in read_pointers(store, "again", "judged").items()}
    assert read == {stage: first[stage] for stage in ("transplant", "align", "distill", "finetune")}
    state = radlads_evaluate("nobody", recipe, run="x", **places, return_state=True)
    assert "no finished model of a run 'nobody'" in state.message
    state = radlads_evaluate("nobody", run="x", **places, return_state=True)
    assert "there is no run 'nobody'" in state.message


def test_a_run_is_judged_by_its_own_recipe(recipe, places, jobs):
    radlads(recipe, run="r1", overrides={"needle.lengths": [32], "evaluate.context": 16}, **places)
    Path(recipe).unlink()
    radlads_evaluate("r1", run="again", overrides={"needle.trials": 6}, **places)
    asked = jobs.specs["needle"].spec["section"]
    assert (asked["lengths"], asked["trials"]) == ([32], 6)
    assert jobs.specs["evaluate"].spec["section"]["context"] == 16
    assert jobs.specs["evaluate"].spec["other_teacher"] is False
    assert jobs.launched["tokenize"] == 1


def test_another_teacher_judges_only_where_it_is_meant(recipe, places, jobs):
    radlads(recipe, run="r1", **places)
    jobs.launched.clear()
    jobs.teacher = "another"
    state = radlads_evaluate("r1", run="again", **places, return_state=True)
    assert "'transplant' was converted from another teacher (f)" in state.message
    assert "--other-teacher" in state.message
    assert len(messages(state)) == 1
    assert dict(jobs.launched) == {"plan": 1}
    radlads_evaluate("r1", run="again", other_teacher=True, **places)
    for stage in ("evaluate", "needle"):
        assert jobs.specs[stage].spec["other_teacher"] is True
        assert jobs.specs[stage].spec["teacher"]["fingerprint"] == "another"


def test_another_text_in_the_same_run_is_a_new_plan_and_only_what_reads_it_is_new(recipe, places, jobs, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "recipe" / f"{name}.txt").write_text(f"A needle. In hay of {name}.")
    asked = {"needle.haystack": ["a.txt"]}
    radlads(recipe, run="r1", overrides=asked, **places)
    pin = jobs.specs["needle"].spec["pins"]["section.haystack"]
    assert pin["place"] == [f"{tmp_path}/recipe/a.txt"]
    for _ in range(2):
        jobs.launched.clear()
        jobs.contents["needle.haystack"] = "content of b"
        radlads(recipe, run="r1", overrides={"needle.haystack": ["b.txt"]}, **places)
    assert not jobs.launched, "the second time it is the same plan"
    assert jobs.specs["plan"].spec["contents"].keys() == {"needle.haystack"}
    assert jobs.specs["needle"].spec["pins"]["section.haystack"]["content"] == "content of b"


def test_a_store_of_the_layout_before_is_refused_before_anything_is_written(recipe, places, jobs, tmp_path):
    radlads(recipe, run="r1", **places)
    old = tmp_path / "store" / "runs" / "old" / "align" / "job" / "log.txt"
    old.parent.mkdir(parents=True)
    old.write_text("")
    (tmp_path / "store" / "layout").unlink()
    again = radlads(recipe, run="r2", **places, return_state=True)
    judged = radlads_evaluate("r1", run="again", **places, return_state=True)
    for state in (again, judged):
        assert "radlads store upgrade" in state.message
        assert len(messages(state)) == 1
    assert not (tmp_path / "store" / "runs" / "r2").exists()


def test_pretraining(tmp_path, recipe, places, jobs):
    raw = yaml.safe_load(Path(recipe).read_text())
    section = {**raw["align"], "config": {"model_type": "qwen3"}, "tokenizer": "demo:tokenizer"}
    raw = {"name": "teacher", "data": raw["data"], "pretrain": section}
    path = tmp_path / "recipe" / "teacher.yaml"
    path.write_text(yaml.safe_dump(raw))
    made = radlads_pretrain(str(path), run="t1", **places)
    assert jobs.order == ["plan", "tokenize", "pretrain", "publish"]
    assert set(jobs.specs["pretrain"].inputs) == {"data"}
    assert made["pretrain"] == f"{tmp_path}/store/products/pretrain/{jobs.specs['pretrain'].digest}"
    state = radlads_pretrain(recipe, run="t2", **places, return_state=True)
    assert "no section `pretrain`" in state.message
    state = radlads(str(path), run="t3", **places, return_state=True)
    assert "run it with radlads-pretrain" in state.message


@pytest.fixture
def bucket(monkeypatch):
    """An S3 endpoint on loopback, with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("RADLADS_S3_ENDPOINT", endpoint)
    # Not the default session, which would keep these credentials for every later test.
    boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(
        Bucket="converted"
    )
    yield "s3://converted/radlads"
    server.stop()


def test_products_in_s3(recipe, places, jobs, bucket):
    places = {**places, "store": bucket}
    made = radlads(recipe, run="r1", **places)
    assert made["publish"].startswith("s3://converted/radlads/products/publish/")
    assert radlads(recipe, run="r1", **places) == made
    assert set(jobs.launched.values()) == {1}
    store = open_store(jobs.specs["align"].store)
    assert store.read_file(store.key(made["publish"]), "report.md") == b"# Report"


def test_a_missing_bucket_is_said_in_one_line(recipe, places, jobs, bucket):
    state = radlads(recipe, run="r1", **{**places, "store": "s3://nowhere/x"}, return_state=True)
    assert state.message.startswith("bucket 'nowhere' does not exist")
    assert not jobs.launched
