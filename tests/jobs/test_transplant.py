"""transplant: everything accounted for, loadable, and the identity where nothing is converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from radlads.model.student.load import load_student
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.sections import Student
from radlads.tasks.contracts.recipe.teacher import TransplantScale
from radlads.tasks.contracts.specs import TransplantSpec
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.sources import pin_teacher


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


def test_scaled_scores_are_exported_and_told(run_transplant: Any):
    folder, _ = run_transplant(attention_layers=(0, 1), attention_rope=True, attention_log_scale=3)
    sheet = json.loads((folder / "transplant.json").read_text())
    assert "attention_log_scale is on" in sheet["logits"]["verdict"]
    assert load_student(folder / "model").config.attention_log_scale == 3


def test_fresh_parameters_are_seeded(run_transplant: Any):
    folder, first = run_transplant()
    (folder / "manifest.json").unlink()
    _, second = run_transplant()
    assert {f.path: f.sha256 for f in first.files} == {f.path: f.sha256 for f in second.files}


@pytest.fixture(scope="module")
def fused_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny Phi-3 whose head is its embeddings, in several files, in bf16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Phi3Config(
        **sizes, num_key_value_heads=2, vocab_size=405, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0
    )
    folder = tmp_path_factory.mktemp("phi3")
    teacher = Phi3ForCausalLM(config).to(torch.bfloat16)
    teacher.generation_config.eos_token_id = [2, 9]
    teacher.save_pretrained(folder, max_shard_size=20_000)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def test_fused_and_tied_teachers_with_multipliers(make_job: Any, run_main: Any, fused_folder: Path):
    student = Student(
        attention_layers=(1,), untie_embeddings=True, transplant=TransplantScale(q=0.5, k=0.5, v=0.25, o=0.5)
    )
    job = make_job("transplant", TransplantSpec(teacher=pin_teacher(str(fused_folder)), student=student))
    manifest = run_main(transplant.main, job)
    folder = Path(job.spec.output_uri)
    sheet = json.loads((folder / "transplant.json").read_text())
    assert sheet["multipliers"] == manifest.spec["student"]["transplant"] == {"q": 0.5, "k": 0.5, "v": 0.25, "o": 0.5}
    assert sheet["tensors"]["tied"] == []
    ours, theirs = load_student(folder / "model"), AutoModelForCausalLM.from_pretrained(fused_folder)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.generation_config.eos_token_id == [2, 9]
    assert sheet["parameters"]["copied"] == theirs.num_parameters() + theirs.lm_head.weight.numel()
    assert sheet["parameters"]["copied"] + sheet["parameters"]["fresh"] == ours.num_parameters()
    qkv = theirs.model.layers[2].self_attn.qkv_proj.weight
    assert torch.equal(ours.model.layers[2].self_attn.v_proj.weight, qkv[48:] * 0.25)
    assert torch.equal(ours.model.layers[1].self_attn.qkv_proj.weight, theirs.model.layers[1].self_attn.qkv_proj.weight)
    progress = json.loads((job.scratch / "progress.json").read_text())
    assert progress["unit"] == "tensors"


def test_a_missing_file_is_named_before_anything_is_written(make_job: Any, fused_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(fused_folder, tmp_path / "phi3"))
    lost = sorted(folder.glob("*.safetensors"))[-1]
    teacher = pin_teacher(str(folder))
    lost.unlink()
    job = make_job("transplant", TransplantSpec(teacher=teacher, student=Student()))
    with pytest.raises(UserError, match=f"lacks {lost.name}"):
        transplant.main(job)
    assert not list(job.output.glob("**/*.safetensors"))
