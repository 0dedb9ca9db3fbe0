"""Students are taught and judged by the teacher that they were converted from, on text of its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef
from radlads.tasks.contracts.recipe.choice import AttentionChoice
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Finetune, Pretrain
from radlads.tasks.contracts.recipe.sections import Dataset, Evaluate, Needle, Student
from radlads.tasks.contracts.specs import (
    ChooseSpec,
    EvaluateSpec,
    NeedleSpec,
    Pin,
    TeacherRef,
    TokenizeSpec,
    TrainSpec,
    TransplantSpec,
)
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.choose import choose
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data import tokens
from radlads.tasks.jobs.judge import evaluate, needle
from radlads.tasks.jobs.origin import check_training, read_origin, write_origin
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher
from radlads.tasks.jobs.train import train

TEACHER = TeacherRef(path="t", fingerprint="teacher", tokenizer_fingerprint="tokenizer")
SIZES = {"tokens": 64, "context": 8, "batch": 2}


def training_spec(stage: str, teacher: TeacherRef = TEACHER) -> TrainSpec:
    kinds = {"align": Align, "distill": Distill, "finetune": Finetune}
    needed = teacher if stage != "finetune" else None
    return TrainSpec(objective=stage, section=kinds[stage](**SIZES), teacher=needed)  # type: ignore[arg-type]


def student_config() -> PreTrainedConfig:
    config = PreTrainedConfig()
    write_origin(config, TEACHER)
    return config


@pytest.mark.parametrize("stage", ["align", "distill", "finetune"])
def test_training_wants_what_belongs_together(stage: str) -> None:
    check_training(training_spec(stage), student_config(), "tokenizer")
    with pytest.raises(UserError, match="made with another tokenizer"):
        check_training(training_spec(stage), student_config(), "another")
    with pytest.raises(UserError, match="does not say which teacher"):
        check_training(training_spec(stage), PreTrainedConfig(), "tokenizer")
    for change in ({"fingerprint": "another"}, {"tokenizer_fingerprint": "another"}):
        foreign = training_spec(stage, TEACHER.model_copy(update=change))
        if stage == "finetune":  # no teacher takes part
            check_training(foreign, student_config(), "tokenizer")
        else:
            with pytest.raises(UserError, match="converted from another teacher"):
                check_training(foreign, student_config(), "tokenizer")


def test_a_teacher_is_made_from_text_of_its_tokenizer() -> None:
    section = Pretrain.model_validate(SIZES | {"config": {}, "tokenizer": "t"})
    pins = {"section.tokenizer": Pin(kind="tokenizer", place=("t",), content="tokenizer")}
    spec = TrainSpec(objective="pretrain", section=section, pins=pins, teacher=None)
    check_training(spec, PreTrainedConfig(), "tokenizer")
    with pytest.raises(UserError, match="made with another tokenizer"):
        check_training(spec, PreTrainedConfig(), "another")


def message(job: Job) -> str:
    said: str = json.loads((job.scratch / "exit.json").read_text())["message"]
    assert len(said.splitlines()) == 1
    return said


def test_a_training_job_refuses_a_dataset_of_another_tokenizer(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = training.job("finetune", "foreign-data")
    folder = shutil.copytree(training.root / "data", training.root / "foreign-data")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"tokenizer_fingerprint": "another"}))
    original = Job.input
    monkeypatch.setattr(Job, "input", lambda self, name: folder if name == "data" else original(self, name))
    assert execute(train.main, job) == "config"
    assert "made with another tokenizer" in message(job)


@pytest.fixture
def student(make_job: Any, run_main: Any, reference: Any, teacher_folder: Path) -> InputRef:
    """A student of teacher_folder, all of it converted."""
    spec = TransplantSpec(teacher=pin_teacher(str(teacher_folder)), student=Student())
    job = make_job("transplant", spec)
    run_main(transplant.main, job)
    config = json.loads((Path(job.spec.output_uri) / "model" / "config.json").read_text())
    origin = read_origin(config)
    assert origin is not None
    assert origin.is_from(spec.teacher)
    made: InputRef = reference(job)
    return made


@pytest.fixture
def foreign(teacher_folder: Path, tmp_path: Path) -> TeacherRef:
    """A teacher of the same shape and tokenizer with one other weight."""
    folder = shutil.copytree(teacher_folder, tmp_path / "foreign")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    return pin_teacher(str(folder))


@pytest.fixture
def data(make_job: Any, run_main: Any, reference: Any, teacher_folder: Path, tmp_path: Path, stories: list[str]) -> Any:
    (tmp_path / "stories.txt").write_text("\n---\n".join(stories), encoding="utf-8")
    source = {"kind": "files", "paths": [str(tmp_path / "stories.txt")], "separator": "\n---\n"}
    teacher = pin_teacher(str(teacher_folder))
    spec = TokenizeSpec(
        name="train",
        dataset=Dataset.model_validate({"sources": [source], "heldout_fraction": 0.1}),
        tokenizer=teacher.path,
        tokenizer_fingerprint=teacher.tokenizer_fingerprint,
        teacher=None,
    )
    job = make_job("tokenize", spec)
    run_main(tokens.main, job)
    return reference(job)


EVALUATE = Evaluate(context=32, heldout_tokens=128)
NEEDLE = Needle(lengths=(200,), depths=(0.5,), batch=5, max_new_tokens=2)


def test_judging_against_a_foreign_teacher_is_refused_unless_it_is_meant(
    make_job: Any, run_main: Any, student: InputRef, data: InputRef, foreign: TeacherRef
) -> None:
    refused = [
        (
            evaluate,
            make_job("evaluate", EvaluateSpec(section=EVALUATE, teacher=foreign), {"student": student, "data": data}),
        ),
        (
            needle,
            make_job("needle", NeedleSpec(section=NEEDLE, teacher=foreign, training_length=9), {"student": student}),
        ),
    ]
    section = AttentionChoice(count=1, choose="difficulty")
    choice = ChooseSpec(section=section, teacher=foreign, attention_rope=False, run_tokens=10**6)
    refused.append((choose, make_job("choose", choice, {"student": student})))
    for module, job in refused:
        assert execute(module.main, job) == "config"
        assert "converted from another teacher" in message(job)
    meant = EvaluateSpec(section=EVALUATE, teacher=foreign, other_teacher=True)
    job = make_job("evaluate", meant, {"student": student, "data": data})
    run_main(evaluate.main, job)
    sheet = json.loads((Path(job.spec.output_uri) / "evaluate.json").read_text())
    assert sheet["other_teacher"] is True
    assert sheet["teacher"]["fingerprint"] == foreign.fingerprint


def test_the_own_teacher_at_another_place_is_the_own_teacher(
    make_job: Any, run_main: Any, student: InputRef, teacher_folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(teacher_folder, tmp_path / "moved")
    spec = NeedleSpec(section=NEEDLE, teacher=pin_teacher(str(moved)), training_length=9)
    job = make_job("needle", spec, {"student": student})
    run_main(needle.main, job)
    assert json.loads((Path(job.spec.output_uri) / "needle.json").read_text())["other_teacher"] is False


def test_another_vocabulary_is_never_judged(
    make_job: Any, student: InputRef, data: InputRef, foreign: TeacherRef
) -> None:
    tokenizer = load_tokenizer(foreign.path)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(foreign.path)
    spec = NeedleSpec(section=NEEDLE, teacher=pin_teacher(foreign.path), other_teacher=True, training_length=9)
    job = make_job("needle", spec, {"student": student})
    assert execute(needle.main, job) == "config"
    assert "another vocabulary" in message(job)
