"""Every tensor is accounted for, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.tasks.contracts.errors import UserError

SETTINGS = {"variant": "rad_rwkv7", "options": {}, "attention_layers": (1,), "attention_rope": False}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_the_report_is_total(make_teacher, model_type: str, tied: bool) -> None:
    teacher = make_teacher(model_type, tie_word_embeddings=tied, attention_bias=True)
    student = build_student(teacher.config, **SETTINGS)
    report = transplant(teacher, student)
    names = set(student.state_dict())
    assert set(report.copied) | set(report.fresh) | set(report.tied) == names
    assert len(report.copied) + len(report.fresh) + len(report.tied) == len(names)
    assert report.dropped == ()
    assert report.tied == (("lm_head.weight",) if tied else ())
    assert all(student.parameter_group(name) == "mixer" for name in report.fresh)
    for name in report.copied:
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name]), name
    assert "model.layers.0.self_attn.q_proj.bias" in report.copied
    assert "model.layers.0.self_attn.v0" not in names
    assert "model.layers.2.self_attn.v0" in report.fresh


def test_another_size_is_refused(make_teacher) -> None:
    student = build_student(make_teacher("qwen3", intermediate_size=64).config, **SETTINGS)
    with pytest.raises(UserError, match=r"mlp.*is \(.*in the teacher and"):
        transplant(make_teacher("qwen3"), student)


def test_a_tensor_without_a_place_or_a_source_is_refused(make_teacher) -> None:
    plain, biased = make_teacher("qwen3"), make_teacher("qwen3", attention_bias=True)
    with pytest.raises(UserError, match=r"without a place: \['model.layers.0.self_attn.k_proj.bias'"):
        transplant(biased, build_student(plain.config, **SETTINGS))
    with pytest.raises(UserError, match="without a source"):
        transplant(make_teacher("qwen3", num_hidden_layers=2), build_student(plain.config, **SETTINGS))


def test_weights_take_the_dtype_of_the_student(make_teacher) -> None:
    teacher = make_teacher("llama")
    student = build_student(teacher.config, **SETTINGS, dtype=torch.bfloat16)
    transplant(teacher, student)
    assert student.dtype == torch.bfloat16
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight.bfloat16())
    assert torch.get_default_dtype() == torch.float32


def test_meta_students_have_sizes_and_groups(make_teacher) -> None:
    config = make_teacher("qwen3", tie_word_embeddings=True).config
    with torch.device("meta"):
        student = build_student(config, **SETTINGS)
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    groups = {name: student.parameter_group(name) for name, _ in student.named_parameters()}
    assert set(groups.values()) == {"mixer", "attention", "mlp", "norms", "embeddings"}
    assert groups["model.layers.0.self_attn.q_norm.weight"] == "mixer"
    assert groups["model.layers.1.self_attn.q_norm.weight"] == "attention"
    assert groups["model.norm.weight"] == "norms"
    assert student.parameter_group("lm_head.weight") == "head"
    with pytest.raises(KeyError):
        student.parameter_group("model.vision.weight")


def test_generation_defaults_come_along(make_teacher) -> None:
    teacher = make_teacher("llama")
    teacher.generation_config.eos_token_id = [2, 9]
    student = build_student(teacher.config, **SETTINGS)
    transplant(teacher, student)
    assert student.generation_config.eos_token_id == [2, 9]
