"""What MLflow shows of a run to compare it: parameters, curves over tokens, final numbers."""

from datetime import UTC, datetime

import pytest
from mlflow import MlflowClient

from radlads.tasks.contracts.job import CodeVersion, Manifest
from radlads.tasks.contracts.mirrors.record_file import TokenAxis, named
from radlads.tasks.contracts.recipe.losses import Distill
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.contracts.tracking import RunIdentity, open_pipeline_run, open_stage_run
from radlads.tasks.mirrored.params import run_params, stage_params
from radlads.tasks.mirrored.products import mirror_product


def test_losses_have_a_curve_over_tokens():
    axis = TokenAxis()
    rows = [
        {"step": 0, "heldout/loss": 3.0},
        {"step": 1, "loss": 2.0, "tokens": 512, "grad_norm": 1.0},
        {"step": 1, "heldout/loss": 2.5, "heldout/layer_00": 0.5},
    ]
    points = [point for row in rows for point in named(row, "", axis.at(row))]
    assert [point for point in points if point[0].startswith("by_tokens/")] == [
        ("by_tokens/heldout/loss", 3.0, 0), ("by_tokens/loss", 2.0, 512), ("by_tokens/heldout/loss", 2.5, 512),
    ]  # fmt: skip
    assert ("grad_norm", 1.0, 1) in points
    assert [name for name, _, _ in named({"step": 4, "loss": 1.0}, "rollback-1/", None)] == ["rollback-1/loss"]


@pytest.mark.parametrize(
    ("tokens", "asked", "interval"),
    [(10_000, None, 0), (1_000_000, None, 82), (100_000_000, None, 2442), (100_000_000, 0, 0), (10_000, 7, 7)],
)
def test_heldout_points_along_the_way_cost_at_most_a_twentieth(tokens, asked, interval):
    rates = {"mixer_rate": {"start": 1e-4, "final": 1e-5}, "rest_rate": {"start": 1e-4, "final": 1e-5}}
    section = Distill(tokens=tokens, context=512, batch=8, heldout_every=asked, **rates)
    assert section.heldout_interval == interval
    if asked is None and interval:
        assert section.num_steps // interval * section.heldout_tokens * 20 <= tokens


def test_a_run_and_its_stages_name_a_key_alike():
    recipe = load_recipe("qwen3-8b-hybrid")
    run = run_params(recipe)
    assert (run["teacher"], run["variant"]) == ("Qwen/Qwen3-8B", recipe.student.variant)
    assert "by" in run["layers"]
    assert "description" not in run
    assert None not in run.values()
    spec = {"objective": "distill", "section": recipe.distill.model_dump(mode="json"), "pins": {"a": {}}}
    stage = stage_params(recipe, "distill", spec)
    of_the_section = {key: value for key, value in run.items() if key.startswith("distill.")}
    assert of_the_section.items() <= stage.items()
    assert stage["layers"] == run["layers"]
    assert not [key for key in stage if key.startswith(("pins", "section"))]
    assert "variant" not in run_params(load_recipe("demo-teacher"))


def test_the_run_above_has_the_numbers_that_count(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parent = open_pipeline_run(uri, "recipe", RunIdentity(store="s", run="r"))
    made = {
        "align": {"loss": 0.5, "gpu_hours": 1.5, "dollars": 3.0, "memory_bytes": 9, "seconds": 10.0},
        "distill": {"loss": 0.1, "gpu_hours": 2.0, "dollars": 4.0, "memory_bytes": 7, "seconds": 20.0},
        "evaluate": {"kl": 0.25, "student/bits_per_byte": 0.8, "teacher/bits_per_byte": 0.7, "seconds": 5.0},
        "needle": {"student/needle": 1.0, "seconds": 1.0},
    }
    for _ in range(2):
        for stage, metrics in made.items():
            manifest = Manifest(
                stage=stage, digest=stage, spec={}, files=(), metrics=metrics,
                code=CodeVersion(sha=None, versions={}), created_at=datetime.fromtimestamp(1, UTC),
            )  # fmt: skip
            run = open_stage_run(parent, "r", stage, stage)
            assert mirror_product(parent, run, stage, f"/store/{stage}", manifest)
    client = MlflowClient(uri)
    metrics = client.get_run(parent.run_id).data.metrics
    counted = {name: value for name, value in metrics.items() if name.startswith(("final/", "total/"))}
    assert counted == {
        "final/kl": 0.25, "final/bits_per_byte": 0.8, "final/needle": 1.0,
        "total/gpu_hours": 3.5, "total/dollars": 7.0, "total/seconds": 36.0, "total/memory_bytes": 9.0,
    }  # fmt: skip
    assert [point.value for point in client.get_metric_history(parent.run_id, "total/gpu_hours")] == [1.5, 3.5]
