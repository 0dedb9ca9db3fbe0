"""transplant: everything accounted for, loadable, and the identity where nothing is converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from radlads.model.student import load_student
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.sources import pin_teacher
from radlads.tasks.sections import Student
from radlads.tasks.specs import TransplantSpec


@pytest.fixture
def run_transplant(make_job: Callable[..., Job], run_main: Any, teacher_folder: Path) -> Callable[..., Any]:
    def run(**student: Any) -> tuple[Path, Any]:
        job = make_job(
            "transplant", TransplantSpec(teacher=pin_teacher(str(teacher_folder)), student=Student(**student))
        )
        manifest = run_main(transplant.main, job)
        return Path(job.spec.output_uri), manifest

    return run


def test_every_parameter_is_accounted_for(run_transplant: Any, teacher_folder: Path):
    folder, manifest = run_transplant(attention_layers=(1,))
    sheet = json.loads((folder / "transplant.json").read_text())
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    student = load_student(folder / "model")
    total = sum(p.numel() for p in student.parameters())
    assert sheet["parameters"]["copied"] + sheet["parameters"]["fresh"] == total
    assert sheet["parameters"]["copied"] == sum(p.numel() for p in teacher.parameters())
    assert sheet["parameters"]["dropped"] == 0
    assert sheet["layers"]["layer 0"]["fresh"] == sheet["parameters"]["fresh"] > 0
    assert sheet["layers"]["layer 1"]["fresh"] == 0
    assert sheet["mixers"] == [0]
    assert manifest.metrics["converted_layers"] == 1
    assert torch.equal(student.model.layers[0].self_attn.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight)
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 2


def test_nothing_converted_is_the_teacher_bit_for_bit(run_transplant: Any):
    folder, _ = run_transplant(attention_layers=(0, 1), attention_rope=True)
    sheet = json.loads((folder / "transplant.json").read_text())
    assert sheet["logits"]["bit_equal"]
    assert sheet["parameters"]["fresh"] == 0


def test_without_rope_it_says_that_it_differs(run_transplant: Any):
    folder, _ = run_transplant(attention_layers=(0, 1), attention_rope=False)
    sheet = json.loads((folder / "transplant.json").read_text())
    assert not sheet["logits"]["bit_equal"]
    assert "attention_rope is off" in sheet["logits"]["verdict"]


def test_fresh_parameters_are_seeded(run_transplant: Any):
    folder, first = run_transplant()
    (folder / "manifest.json").unlink()
    _, second = run_transplant()
    assert {f.path: f.sha256 for f in first.files} == {f.path: f.sha256 for f in second.files}
