"""Twenty steps of every objective on a CPU against golden curves, and how a training job ends."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from radlads.model.student.load import load_student
from radlads.model.training.objectives import Objective, build_objective
from radlads.tasks.contracts.recipe.recipe import Rate
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.engines.parameter_groups import select_trainable

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "train_curves.json"
STAGES = ("align", "distill", "finetune", "pretrain")
RATES = {"mixer_rate": Rate(start=3e-3, final=1e-3), "rest_rate": Rate(start=1e-3, final=1e-4)}


@pytest.fixture(scope="module")
def trained(training) -> dict[str, Job]:
    """A finished job of every stage."""
    jobs = {}
    for stage in STAGES:
        job = training.job(stage, "golden", heldout_every=10, **RATES)
        assert execute(train.main, job) == "done", training.ending(job)
        jobs[stage] = job
    return jobs


@pytest.fixture(scope="module")
def golden(training, trained) -> dict[str, list[float]]:
    """The reference curves. After a change that is meant to move them: delete the file, run, look, commit."""
    if not GOLDEN.is_file():
        curves = {stage: [round(loss, 6) for _, loss in training.curve(trained[stage])] for stage in STAGES}
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN} anew")
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_follow_the_golden_curve(training, trained, golden, stage):
    curve = dict(training.curve(trained[stage]))
    assert sorted(curve) == list(range(1, 21))
    for step, loss in enumerate(golden[stage], start=1):
        assert curve[step] == pytest.approx(loss, rel=2e-3), f"step {step}"


@pytest.mark.parametrize("stage", ["distill", "pretrain"])
def test_recomputed_activations_give_the_same_curve(training, stage):
    curves = []
    for recompute in (False, True):
        job = training.job(stage, f"recompute-{recompute}", gradient_checkpointing=recompute, tokens=5 * 128, **RATES)
        assert execute(train.main, job) == "done", training.ending(job)
        curves.append([loss for _, loss in training.curve(job)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_documents_can_be_kept_apart(training, stage):
    job = training.job(stage, "apart", reset_at_documents=True, tokens=2 * 128, **RATES)
    assert execute(train.main, job) == "done", training.ending(job)
    assert len(training.curve(job)) == 2


def test_assistant_only_without_masks_is_refused(training):
    job = training.job("finetune", "unmasked", assistant_only=True)
    assert execute(train.main, job) == "config"
    assert "messages_field" in training.ending(job)["message"]


def test_a_dataset_of_a_larger_vocabulary_is_refused(training, monkeypatch):
    job = training.job("finetune", "vocabulary")
    opened = train.open_dataset
    monkeypatch.setattr(train, "open_dataset", lambda folder: replace(opened(folder), vocab_size=401))
    assert execute(train.main, job) == "config"
    assert "tokenizer of 401 tokens, the model knows 400" in training.ending(job)["message"]


@pytest.mark.parametrize("stage", STAGES)
def test_training_lowers_the_heldout_loss(trained, stage):
    report = json.loads((trained[stage].output / "train.json").read_text())
    losses = dict(report["heldout_losses"])
    assert losses[20] < losses[10] < losses[0]
    assert report["heldout/loss"] == losses[20]


def test_every_row_of_the_record_tells_what_a_step_did(trained):
    rows = [json.loads(line) for line in (trained["align"].output / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 7)
    for key in ("loss", "layer_00", "layer_01", "grad_norm", "lr/mixer", "lr/rest", "seconds", "memory_bytes"):
        assert row[key] >= 0
    assert row["tokens"] == 7 * 4 * 32
    assert row["loss"] == pytest.approx((row["layer_00"] + row["layer_01"]) / 2)


def test_a_converted_product_loads_and_its_manifest_has_the_numbers(trained):
    job = trained["distill"]
    manifest = job.store.read_manifest(job.output_prefix)
    assert manifest is not None
    assert {"heldout/kl", "heldout/top1_agreement", "tokens", "tokens_per_second", "loss"} <= set(manifest.metrics)
    assert {"train.json", "metrics.jsonl", "model/config.json", "model/tokenizer.json"} <= {
        f.path for f in manifest.files
    }
    load_student(job.output / "model")


def test_a_pretrained_product_is_a_plain_hugging_face_model(trained):
    model = AutoModelForCausalLM.from_pretrained(trained["pretrain"].output / "model")
    assert model.config.model_type == "qwen3"


def test_align_moves_the_mixers_and_nothing_else(training, trained):
    before = load_student(training.root / "student" / "model").state_dict()
    after = load_student(trained["align"].output / "model")
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    mixers = {name for name, _ in after.named_parameters() if after.parameter_group(name) == "mixer"}
    assert moved
    assert moved <= mixers


def test_freeze_is_honoured(training):
    job = training.job("finetune", "freeze", freeze=("mlp", "norms"), tokens=128)
    networks = train.load_networks(job, job.typed)
    objective = build_objective(job.typed, networks.student, None)
    chosen = select_trainable(objective, job.typed.section)
    groups = {objective.group(name) for name, _ in chosen["mixer"] + chosen["rest"]}
    assert groups == {"mixer", "embeddings"}
    assert all(objective.group(name) == "mixer" for name, _ in chosen["mixer"])
    assert not any(p.requires_grad for n, p in networks.student.named_parameters() if objective.group(n) == "mlp")


class Poisoned(Objective):
    """Becomes infinite or NaN on its third call."""

    calls = 0
    factor = math.inf

    def forward(self, batch):
        hidden = self.student.hidden(batch["input_ids"][:, :-1])
        type(self).calls += 1
        loss = hidden.float().pow(2).mean()
        if self.calls == 5:  # the first forward pass of the third step
            loss = loss * self.factor
        return loss, {}


@pytest.mark.parametrize(("zero_stage", "value"), [(0, math.inf), (1, math.nan), (2, math.inf)])
def test_a_step_that_is_not_finite_moves_nothing(training, zero_stage, value, monkeypatch):
    Poisoned.calls, Poisoned.factor = 0, value
    seen = {}

    def build(spec, student, teacher):
        seen["student"] = student
        return Poisoned(spec.section, student, teacher)

    step = Engine.step

    def remember(self, *args, **kwargs):
        seen["before"] = {name: value.clone() for name, value in seen["student"].state_dict().items()}
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train, "build_objective", build)
    monkeypatch.setattr(Engine, "step", remember)
    job = training.job(
        "finetune", f"nonfinite-{zero_stage}", resources={"zero_stage": zero_stage}, checkpoint_every=1, **RATES
    )
    assert execute(train.main, job) == "nonfinite"
    assert "step 3" in training.ending(job)["message"]
    for name, value in seen["student"].state_dict().items():
        assert torch.equal(value, seen["before"][name]), name
    checkpoints = job.store.list(f"{job.output_prefix}/checkpoints")
    assert any("step-000002/manifest.json" in key for key in checkpoints)
    assert not any("step-000003" in key for key in checkpoints)
    assert job.store.read_manifest(job.output_prefix) is None
