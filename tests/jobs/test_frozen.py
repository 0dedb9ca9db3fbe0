"""What a training job holds once, and in 8 bit: the same numbers as without, and whole tensors in the export."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from radlads.model.training.quantized import quantized_names
from radlads.model.weights.weight_files import open_weight_files
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Rate
from radlads.tasks.contracts.specs import spec_digest
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.train import frozen_weights, train, training_models
from radlads.tasks.jobs.train.training_models import load_networks

RATES = {"mixer_rate": Rate(start=3e-3, final=1e-3), "rest_rate": Rate(start=1e-3, final=1e-4)}
EVERYTHING = ("mlp", "embeddings", "head")


def make(training: Any, stage: str, name: str, *, teacher_bits: int = 16, mlp_bits: int = 16, **section: Any) -> Job:
    """A job as in `training.job`, its frozen weights held in these bits."""
    spec = training.job(stage, f"frozen-{name}", **{**RATES, "tokens": 6 * 128, **section}).spec
    changed = spec.spec | {"teacher_bits": teacher_bits, "mlp_bits": mlp_bits}
    typed = type(Job(spec=spec).typed).model_validate(changed)
    job = Job(spec=spec.model_copy(update={"spec": changed, "digest": spec_digest(stage, typed, spec.inputs)}))
    (job.scratch / "job.json").write_text(job.spec.model_dump_json(), encoding="utf-8")
    return job


def run(training: Any, job: Job) -> list[float]:
    assert execute(train.main, job) == "done", training.ending(job)
    return [loss for _, loss in training.curve(job)]


def exported(job: Job) -> dict[str, torch.Tensor]:
    files = open_weight_files(str(Path(job.spec.output_uri) / "model"))
    return {name: files.read(name) for name in files.names()}


def given(job: Job) -> dict[str, torch.Tensor]:
    files = open_weight_files(str(job.input("student") / "model"))
    return {name: files.read(name) for name in files.names()}


def held(model: torch.nn.Module) -> set[int]:
    """Addresses of everything that a model holds, numbers that are computed aside."""
    buffers = [b for name, b in model.named_buffers() if name.endswith(("_int8", "_scale"))]
    return {tensor.data_ptr() for tensor in (*model.parameters(), *buffers)}


@pytest.mark.parametrize("teacher_bits", [8, 16])
@pytest.mark.parametrize(
    ("stage", "freeze"), [("align", ()), ("distill", EVERYTHING), ("distill", ("mlp",)), ("distill", ())]
)
def test_what_is_frozen_in_both_is_held_once(training, stage, freeze, teacher_bits):
    job = make(training, stage, "memory", freeze=freeze, teacher_bits=teacher_bits, mlp_bits=8 if freeze else 16)
    loaded = load_networks(job, job.typed)
    assert loaded.teacher is not None
    own = held(loaded.student) - held(loaded.teacher)
    groups = {loaded.student.parameter_group(n) for n, p in loaded.student.named_parameters() if p.data_ptr() in own}
    assert "mixer" in groups
    shares_mlps = stage == "align" or (bool(freeze) and teacher_bits == 8)
    in_8_bit = {name for name in quantized_names(loaded.student) if ".mlp." in name}
    assert ("mlp" in groups or bool(in_8_bit and not shares_mlps)) == (not shares_mlps)
    assert ("embeddings" in groups) == (stage != "align" and "embeddings" not in freeze)
    if shares_mlps and teacher_bits == 8:
        assert in_8_bit == {name for name in quantized_names(loaded.teacher) if ".mlp." in name}


@pytest.mark.parametrize(("stage", "freeze"), [("align", ()), ("distill", EVERYTHING)])
def test_sharing_changes_no_number(training, monkeypatch, caplog, stage, freeze):
    with caplog.at_level(logging.INFO, logger="radlads"):
        shared = make(training, stage, "shared", freeze=freeze, checkpoint_every=4)
        curve = run(training, shared)
    assert "frozen tensors are the teacher's own" in caplog.text
    monkeypatch.setattr(frozen_weights, "share_frozen", lambda *args: [])
    apart = make(training, stage, "apart", freeze=freeze, checkpoint_every=4)
    assert run(training, apart) == curve
    ours, theirs = exported(shared), exported(apart)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_student_whose_mlps_have_moved_keeps_its_own(training, monkeypatch):
    load = training_models.load_student

    def moved(*args: Any, **kwargs: Any) -> Any:
        student = load(*args, **kwargs)
        with torch.no_grad():
            student.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.1)
        return student

    monkeypatch.setattr(training_models, "load_student", moved)
    job = make(training, "distill", "moved", freeze=EVERYTHING)
    loaded = load_networks(job, job.typed)
    assert loaded.teacher is not None
    own = held(loaded.student) - held(loaded.teacher)
    mlps = [n for n, p in loaded.student.named_parameters() if p.data_ptr() in own and ".mlp." in n]
    assert mlps == ["model.layers.0.mlp.up_proj.weight"]


def test_align_says_when_the_teacher_is_not_the_one_that_the_student_was_made_from(training, monkeypatch, caplog):
    load = training_models.load_teacher

    def other(*args: Any, **kwargs: Any) -> Any:
        teacher = load(*args, **kwargs)
        with torch.no_grad():
            teacher.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 0.5
        return teacher

    job = make(training, "align", "other-teacher")
    load_networks(job, job.typed)
    assert "not the teacher's" not in caplog.text
    monkeypatch.setattr(training_models, "load_teacher", other)
    load_networks(job, job.typed)
    assert "1 frozen tensors of the student are not the teacher's, first model.layers.1.mlp.up_proj" in caplog.text


@pytest.mark.parametrize(("stage", "mlp_bits"), [("align", 16), ("distill", 8), ("distill", 16), ("finetune", 8)])
def test_8_bit_stages_learn_and_export_what_they_froze_as_it_was(training, stage, mlp_bits):
    job = make(
        training, stage, f"bits-{mlp_bits}", freeze=() if stage == "align" else EVERYTHING, teacher_bits=8,
        mlp_bits=mlp_bits, gradient_checkpointing=True, tokens=20 * 128,
    )  # fmt: skip
    curve = run(training, job)
    assert sum(curve[-3:]) < sum(curve[:3])
    before, after = given(job), exported(job)
    assert before.keys() == after.keys()
    frozen_names = [name for name in before if ".mlp." in name or "embed" in name]
    assert len(frozen_names) == 7
    assert all(torch.equal(before[name], after[name]) for name in frozen_names)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".self_attn." in name for name in changed)


def test_8_bit_numbers_are_near_those_of_16(training):
    options = {"freeze": EVERYTHING}
    whole = run(training, make(training, "distill", "near-16", **options))
    rounded = run(training, make(training, "distill", "near-8", teacher_bits=8, mlp_bits=8, **options))
    assert rounded != whole
    assert rounded == pytest.approx(whole, rel=0.05)


@pytest.mark.slow
def test_two_ranks_with_8_bit_give_the_curve_of_one(training, run_ranks):
    settings = {"teacher_bits": 8, "mlp_bits": 8, "freeze": EVERYTHING, "micro_batch": 2}
    alone = run(training, make(training, "distill", "one-rank", **settings))
    job = make(training, "distill", "two-ranks", **settings)
    run_ranks("radlads.tasks.jobs.train.train", job, 2)
    both = [loss for _, loss in training.curve(job)]
    assert both == pytest.approx(alone, rel=1e-4)


def test_a_job_that_would_train_8_bit_mlps_is_refused(training):
    job = make(training, "distill", "refused", mlp_bits=8)
    with pytest.raises(
        UserError, match=r"student.mlp_bits is 8, but distill trains the MLPs.*add mlp to distill.freeze"
    ):
        load_networks(job, job.typed)
