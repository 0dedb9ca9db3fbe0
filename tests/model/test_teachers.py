"""Every family of model/teacher/families.py, with a tiny random model of its class."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from radlads.model.convert.transplant import transplant
from radlads.model.mixers.shared.registry import list_variants
from radlads.model.student.load import build_student
from radlads.model.teacher.load import find_family, list_families, load_teacher, load_teacher_config, teacher_warnings
from radlads.tasks.contracts.errors import UserError

FAMILIES = list_families()


def projections(mixer: Any, attention: Any) -> list[tuple[Any, Any]]:
    """Every projection of a mixer beside the one that it came from."""
    pairs = [(mixer.o_proj, attention.o_proj)]
    if hasattr(attention, "q_proj"):
        return pairs + [(getattr(mixer, name), getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
    q, kv = mixer.q_proj.out_features, mixer.k_proj.out_features
    parts = attention.qkv_proj.weight.split([q, kv, kv])
    ours = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    return pairs + [(p, SimpleNamespace(weight=w, bias=None)) for p, w in zip(ours, parts, strict=True)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_finds_every_layer(make_teacher, model_type: str) -> None:
    teacher = make_teacher(model_type)
    family = find_family(teacher.config)
    family.check(teacher)
    attentions = family.attention_modules(teacher)
    assert list(attentions) == [0, 1, 2]
    assert all(hasattr(attention, family.qkv or family.q) for attention in attentions.values())


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
    ("changes", "kept"),
    [
        ({}, ()),
        ({"num_key_value_heads": 1}, (1,)),
        ({"num_key_value_heads": 4}, (0, 2)),
        ({"head_dim": 8, "attention_bias": True}, ()),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "attention_bias": False}, (1,)),
    ],
    ids=str,
)
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
        for ours, theirs in projections(mixer, attentions[layer]):
            assert torch.equal(ours.weight, theirs.weight)
            assert (ours.bias is None) == (theirs.bias is None)
            assert ours.bias is None or torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({}, "no model_type"),
        ({"model_type": "stablelm"}, r"no teacher family for model_type 'stablelm'.*llama.*qwen3_moe"),
        ({"model_type": "gpt2"}, "no RMSNorm"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, "a hybrid already"),
        ({"model_type": "lfm4", "layer_types": ["conv", "full_attention"]}, "mixes kinds of layers"),
        ({"model_type": "jamba"}, "a hybrid already"),
        ({"model_type": "deepseek_v3", "auto_map": {}}, "MLA"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "mixers are causal"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "caps its logits"),
        (
            {"model_type": "my_llm", "auto_map": {"AutoModelForCausalLM": "modeling.X"}},
            "its code comes with its weights",
        ),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "gated delta nets"),
        ({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}}, "gated delta nets"),
        ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention"]}, "mixes kinds of layers"),
        ({"model_type": "paligemma", "text_config": {"model_type": "gemma2"}}, "caps its attention scores"),
        (
            {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}},
            "text part is 'mllama_text_model'",
        ),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "quantization_config": {}}}, None),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama", "quantization_config": {"bits": 4}}},
            "quantised",
        ),
        *(
            ({"model_type": name}, "linear-attention model already")
            for name in ("radlads", "rwkv7", "rwkv_hybrid", "liger_qwen2_gla", "lolcats", "falcon_mamba", "gla")
        ),
        ({"model_type": "llama", "architectures": ["LolcatsModelForCausalLM"]}, "linear-attention model already"),
        ({"model_type": "llama", "architectures": ["LlamaGLAForCausalLM"]}, "linear-attention model already"),
        ({"model_type": "llama", "architectures": ["EnglandForCausalLM"]}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_teach_is_refused_with_the_reason(raw: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        assert find_family(raw).model_type == "llama"
        return
    with pytest.raises(UserError, match=reason) as caught:
        find_family(raw)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("variant", list_variants())
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_variant_converts_every_family(make_teacher, make_student, tokens, model_type: str, variant: str) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    changes = {"head_dim": 8, "rope_parameters": rope} if model_type == "phi3" else {}
    teacher = make_teacher(model_type, **changes)
    student = make_student(teacher, variant=variant, attention_layers=(1,))
    with torch.no_grad():
        logits = student(tokens).logits
    assert sorted(student.mixers()) == [0, 2]
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits, teacher(tokens).logits)


def test_the_code_that_comes_with_the_weights_is_not_run(make_teacher, tmp_path: Path) -> None:
    make_teacher("phi3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise RuntimeError('run')\n")
    teacher = load_teacher(str(tmp_path))
    assert type(teacher).__module__.startswith("transformers.")
    assert load_teacher_config(str(tmp_path)).model_type == "phi3"


def test_what_a_user_should_know_before_converting(make_teacher) -> None:
    tied = make_teacher("llama", tie_word_embeddings=True).config
    assert len(teacher_warnings(tied)) == 1
    assert "student.untie_embeddings: true" in teacher_warnings(tied)[0]
    assert teacher_warnings(tied, untie_embeddings=True) == []
    assert teacher_warnings(make_teacher("qwen3").config, attention_layers=(0, 1)) == []
    windowed = make_teacher("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1).config
    assert teacher_warnings(windowed, attention_layers=(0,)) == []
    (line,) = teacher_warnings(windowed, attention_layers=(0, 2))
    assert "layers [2] see the last 6 tokens only" in line
    assert teacher_warnings(make_teacher("mistral", sliding_window=4096).config, attention_layers=(0,)) == []
    factors = {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    sizes = {"head_dim": 8, "original_max_position_embeddings": 16}
    (line,) = teacher_warnings(make_teacher("phi3", **sizes, rope_parameters=rope).config)
    assert "beyond 16 tokens (longrope)" in line


def test_bad_layers_are_refused(make_teacher) -> None:
    config = make_teacher("qwen3").config
    rest = {"variant": "rad_rwkv7", "options": {}, "attention_rope": False}
    with pytest.raises(UserError, match="layer 3, but the teacher has the layers 0 to 2"):
        build_student(config, attention_layers=(3,), **rest)


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
