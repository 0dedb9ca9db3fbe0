"""Every file of model/teachers, with a tiny random model of its class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from radlads.model.student import build_student
from radlads.model.teacher import find_family, list_families, load_teacher, load_teacher_config
from radlads.model.transplant import transplant
from radlads.tasks.job import UserError

FAMILIES = list_families()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_finds_every_layer(make_teacher, model_type: str) -> None:
    teacher = make_teacher(model_type)
    family = find_family(teacher.config)
    family.check(teacher)
    attentions = family.attention_modules(teacher)
    assert len(attentions) == teacher.config.num_hidden_layers
    assert all(hasattr(attention, family.q) for attention in attentions)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_layer_converted_gives_the_same_bits(
    make_teacher, make_student, tokens, model_type: str, tied: bool
) -> None:
    teacher = make_teacher(model_type, tie_word_embeddings=tied)
    student = make_student(teacher, attention_layers=(0, 1, 2), attention_rope=True)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, teacher(tokens).logits)
        assert torch.equal(
            student(tokens, attention_mask=mask).logits[:, 5:], teacher(tokens, attention_mask=mask).logits[:, 5:]
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 8},
        {"attention_bias": True},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [(), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_converted_models_run(make_teacher, make_student, tokens, model_type: str, changes, kept) -> None:
    teacher = make_teacher(model_type, **changes)
    student = make_student(teacher, attention_layers=kept)
    with torch.no_grad():
        logits = student(tokens).logits
    assert logits.shape == (2, 21, 64)
    assert torch.isfinite(logits).all()
    attentions = find_family(teacher.config).attention_modules(teacher)
    for layer, mixer in student.mixers().items():
        assert (mixer.q_proj.bias is None) == (attentions[layer].q_proj.bias is None)
        assert mixer.q_proj.weight.shape == attentions[layer].q_proj.weight.shape


def test_unknown_and_converted_models_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"no teacher family for model_type 'gpt2'.*llama"):
        find_family({"model_type": "gpt2"})
    with pytest.raises(UserError, match="text part is 'qwen3'"):
        find_family({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3"}})
    with pytest.raises(UserError, match="quantised"):
        find_family({"model_type": "llama", "quantization_config": {"bits": 4}})
    with pytest.raises(UserError, match="no model_type"):
        find_family({})
    for model_type in ("radlads", "rwkv7", "rwkv_hybrid", "liger_qwen2_gla", "lolcats"):
        with pytest.raises(UserError, match="linear-attention model already"):
            find_family({"model_type": model_type})
    with pytest.raises(UserError, match="linear-attention model already"):
        find_family({"model_type": "llama", "architectures": ["LolcatsModelForCausalLM"]})


def test_missing_parts_are_named(make_teacher) -> None:
    teacher = make_teacher("qwen3")
    del teacher.model.layers[1].self_attn.q_norm
    with pytest.raises(UserError, match=r"layer 1: self_attn\.q_norm"):
        find_family(teacher.config).check(teacher)


def test_load_teacher_is_frozen_and_says_what_is_missing(make_teacher, tmp_path: Path) -> None:
    make_teacher("llama").save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"), dtype=torch.bfloat16)
    assert teacher.dtype == torch.bfloat16
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert load_teacher_config(str(tmp_path / "teacher")).model_type == "llama"
    with pytest.raises(UserError, match=r"no config\.json|no teacher") as caught:
        load_teacher(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_bad_layers_are_refused(make_teacher) -> None:
    config = make_teacher("qwen3").config
    rest = {"variant": "rad_rwkv7", "options": {}, "attention_rope": False}
    with pytest.raises(UserError, match="layer 3, but the teacher has the layers 0 to 2"):
        build_student(config, attention_layers=(3,), **rest)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UserError, match="sliding_attention"):
        build_student(config, attention_layers=(1,), **rest)


@pytest.mark.parametrize("name", ["stories260K", "babyllama_tok361"])
def test_real_teachers_keep_their_golden_logits(shared_data: Path, name: str) -> None:
    folder = shared_data / "teachers" / name
    golden = np.load(folder / "golden_logits.npz")
    teacher = load_teacher(str(folder), dtype=torch.float64)
    input_ids = torch.from_numpy(golden["input_ids"]).long()
    everything = tuple(range(teacher.config.num_hidden_layers))
    student = build_student(
        teacher.config,
        variant="rad_rwkv7",
        options={},
        attention_layers=everything,
        attention_rope=True,
        dtype=torch.float64,
    )
    transplant(teacher, student)
    with torch.no_grad():
        logits = student.eval()(input_ids).logits
        assert torch.equal(logits, teacher(input_ids).logits)
    wanted = torch.from_numpy(golden["logits"]).double()
    torch.testing.assert_close(logits.reshape(wanted.shape), wanted, atol=1e-4, rtol=1e-4)


def test_real_configs_are_taken_or_refused_for_what_they_are(shared_data: Path) -> None:
    for path in sorted((shared_data / "configs").glob("*.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["model_type"] in FAMILIES:
            assert find_family(raw).model_type == raw["model_type"]
        else:
            with pytest.raises(UserError):
                find_family(raw)
