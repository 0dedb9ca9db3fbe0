"""Calibration as a part of the align job: its numbers, its place in the digest, and the resumed attempt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from radlads.model.student.load import load_student
from radlads.model.teacher.load import load_teacher
from radlads.model.training.calibration import alignment_loss
from radlads.tasks.contracts.recipe.recipe import Rate, load_recipe
from radlads.tasks.contracts.recipe.teacher import Calibration
from radlads.tasks.contracts.specs import TrainSpec, spec_digest
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.training_checks import check_training
from radlads.tasks.jobs.train import steps, train
from radlads.tasks.jobs.train.calibrate import heldout_batches, training_batches

RATES = {"mixer_rate": Rate(start=3e-3, final=1e-3)}


def align_job(training: Any, name: str, calibration: Calibration | None, **section: Any) -> Job:
    job = training.job("align", name, **RATES, **section)
    spec = TrainSpec.model_validate(job.spec.spec | {"calibrate": calibration})
    digest = spec_digest("align", spec, dict(job.spec.inputs))
    sheet = job.spec.model_copy(update={"spec": spec.model_dump(mode="json"), "digest": digest})
    (job.scratch / "job.json").write_text(sheet.model_dump_json())
    return Job(spec=sheet)


def finish(training: Any, job: Job) -> dict[str, Any]:
    assert execute(train.main, job) == "done", training.ending(job)
    manifest = job.store.read_manifest(job.output_prefix)
    assert manifest is not None
    return manifest.metrics


def test_the_manifest_says_what_calibration_brought(training: Any):
    asked = Calibration(batches=2, sequences=4)
    job = align_job(training, "calibrated", asked)
    metrics = finish(training, job)
    assert metrics["step0_loss_calibrated"] < metrics["step0_loss_uncalibrated"]
    assert metrics["calibration_tokens"] == 2 * 4 * 32
    student = load_student(Path(training.root) / "student" / "model")
    teacher = load_teacher(str(training.teacher), dtype=torch.float32, device="cpu")
    dataset = open_dataset(Path(training.root) / "data")
    unseen = heldout_batches(dataset.split("heldout"), 4, 32)
    assert metrics["step0_loss_uncalibrated"] == pytest.approx(alignment_loss(student, teacher, unseen), rel=1e-5)
    sheet = json.loads((Path(job.spec.output_uri) / "train.json").read_text())
    assert sheet["step0_loss_calibrated"] == metrics["step0_loss_calibrated"]


def test_the_first_step_is_nearer(training: Any):
    plain = align_job(training, "plain", None, tokens=2 * 4 * 32)
    fitted = align_job(training, "fitted", Calibration(batches=2, sequences=4), tokens=2 * 4 * 32)
    finish(training, plain)
    finish(training, fitted)
    assert training.curve(fitted)[0][1] < training.curve(plain)[0][1]
    assert plain.spec.digest != fitted.spec.digest


def test_resuming_ends_at_the_same_weights(training: Any, monkeypatch: pytest.MonkeyPatch):
    asked = Calibration(batches=1, sequences=4)
    whole = align_job(training, "whole", asked)
    metrics = finish(training, whole)
    cut = align_job(training, "cut", asked)
    real = steps.learning_rates
    monkeypatch.setattr(steps, "learning_rates", lambda section, step: 1 / 0 if step == 9 else real(section, step))
    assert execute(train.main, cut) == "crash"
    monkeypatch.setattr(steps, "learning_rates", real)
    again = Job(spec=cut.spec)
    resumed = finish(training, again)
    assert resumed["step0_loss_calibrated"] == metrics["step0_loss_calibrated"]
    ours, theirs = (load_student(Path(job.spec.output_uri) / "model").state_dict() for job in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_batches_are_spread_over_the_text(training: Any):
    split = open_dataset(Path(training.root) / "data").split("train")
    batches = training_batches(split, Calibration(batches=2, sequences=3), 32)
    assert [tuple(ids.shape) for ids in batches] == [(3, 32), (3, 32)]
    last = split.batch([split.rows(32) - 1], 32)["input_ids"][0, :-1]
    assert torch.equal(batches[-1][-1], last)
    few = training_batches(split, Calibration(batches=1000, sequences=8), 32)
    assert sum(len(ids) for ids in few) == split.rows(32)


@pytest.mark.parametrize(("variant", "faults"), [("rad_rwkv7", 0), ("sliding_window", 1)])
def test_the_plan_refuses_to_calibrate_what_has_no_parts_for_it(variant: str, faults: int) -> None:
    findings = Findings()
    recipe = load_recipe("smoke", {"student": {"variant": variant, "calibrate": {}}})
    check_training(recipe, None, 1, findings)
    assert len(findings.faults) == faults
    assert all("student.calibrate: sliding_window has no parts" in fault for fault in findings.faults)
