"""Every family end to end: windows, RoPE types, export and reload, generation, text parts, and real weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from radlads.model.convert.transplant import transplant
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student, load_student
from radlads.model.teacher.load import find_family, list_families, load_teacher

FAMILIES = list_families()
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 6},
}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {**LONGROPE, "short_factor": [1.5] * 8, "long_factor": [3.0 + i for i in range(8)]},
}


@pytest.mark.parametrize("model_type", WINDOWED)
def test_windows_are_kept_to_the_bit(make_teacher, make_student, tokens: Tensor, model_type: str) -> None:
    teacher = make_teacher(model_type, **WINDOWED[model_type])
    student = make_student(teacher, attention_layers=(0, 1, 2), attention_rope=True)
    assert student.config.windowed_layers() == ({0, 1, 2} if model_type in ("mistral", "phi3", "qwen3_moe") else {1, 2})
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, teacher(tokens).logits)
        padded = student(tokens, attention_mask=mask).logits, teacher(tokens, attention_mask=mask).logits
        assert torch.equal(padded[0][:, 5:], padded[1][:, 5:])
        free = make_student(make_teacher(model_type), attention_layers=(0, 1, 2), attention_rope=True)
        assert not torch.equal(free(tokens).logits, student(tokens).logits)


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_windowed_hybrid_decodes_as_it_reads(make_teacher, make_student, tokens: Tensor, model_type: str) -> None:
    student = make_student(make_teacher(model_type, **WINDOWED[model_type]), attention_layers=(1,), attention_rope=True)
    with torch.no_grad():
        whole = student(tokens).logits
        cached = student(tokens[:, :9], use_cache=True)
        steps = [cached.logits]
        for place in range(9, tokens.shape[1]):
            cached = student(tokens[:, place : place + 1], past_key_values=cached.past_key_values)
            steps.append(cached.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_scaled_rope_reaches_attention_and_mixers(
    make_teacher, make_student, tokens: Tensor, model_type: str, kind: str
) -> None:
    rope = {"rope_theta": 10000.0, **SCALED[kind]}
    teacher = make_teacher(model_type, rope_parameters=rope, max_position_embeddings=16 if kind == "dynamic" else 64)
    kept = make_student(teacher, attention_layers=(0, 1, 2), attention_rope=True)
    converted, plain = make_student(teacher), make_student(make_teacher(model_type))
    with torch.no_grad():
        assert torch.equal(kept(tokens).logits, teacher(tokens).logits)
        assert not torch.allclose(converted(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {**LONGROPE, "short_factor": [1.5] * 4, "long_factor": [3.0] * 4},
        {**LONGROPE, "partial_rotary_factor": 0.5, "short_factor": [1.5] * 2, "long_factor": [3.0] * 2},
    ],
    ids=["partial", "longrope", "both"],
)
def test_phi3_rotates_a_part_of_the_head_and_scales_long_contexts(
    make_teacher, make_student, tokens: Tensor, rope: dict[str, Any]
) -> None:
    sizes = {"head_dim": 8, "max_position_embeddings": 64, "original_max_position_embeddings": 16}
    teacher = make_teacher("phi3", rope_parameters={"rope_theta": 10000.0, **rope}, **sizes)
    kept = make_student(teacher, attention_layers=(0, 1, 2), attention_rope=True)
    with torch.no_grad():
        for length in (12, 21):  # within the original length, and beyond it
            assert torch.equal(kept(tokens[:, :length]).logits, teacher(tokens[:, :length]).logits)
        converted = make_student(teacher, attention_layers=(1,))
        assert torch.isfinite(converted(tokens).logits).all()
        # Channels beyond the rotary part do not turn.
        cos, _ = teacher.model.rotary_emb(torch.zeros(1, 1, 32), torch.arange(21)[None])
        assert cos.shape[-1] == 8 * rope.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_students_export_and_load_again(
    make_teacher, make_student, tokens: Tensor, tmp_path: Path, model_type: str
) -> None:
    student = make_student(make_teacher(model_type, **WINDOWED.get(model_type, {})), attention_layers=(1,))
    export_student(student, None, tmp_path)
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    again = load_student(tmp_path)
    with torch.no_grad():
        wanted = student(tokens).logits
        assert torch.equal(again(tokens).logits, wanted)
        assert torch.equal(remote.eval()(tokens).logits, wanted)


@pytest.mark.parametrize("kept", [(), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_generation_with_the_cache_is_generation_without(
    make_teacher, make_student, tokens: Tensor, model_type: str, kept: tuple[int, ...]
) -> None:
    teacher = make_teacher(model_type, **WINDOWED.get(model_type, {}))
    student = make_student(teacher, attention_layers=kept, attention_rope=True)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt, mask = tokens[:, :9].clone(), torch.ones(2, 9, dtype=torch.long)
    prompt[1, :3], mask[1, :3] = 0, 0

    def write(model: Any, **more: Any) -> Tensor:
        config = GenerationConfig(**settings, **more)
        return model.generate(prompt, attention_mask=mask, generation_config=config)

    assert torch.equal(write(student), write(student, use_cache=False))
    if len(kept) == 3:
        assert torch.equal(write(student), write(teacher))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_vl", "qwen2_5_vl"])
def test_the_text_part_of_a_vision_language_model_is_a_language_model(
    tokens: Tensor, tmp_path: Path, make_vision_language: Callable[..., Any], model_type: str, tied: bool
) -> None:
    whole = make_vision_language(model_type, tied)
    whole.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (
        find_family(raw).model_type
        == {"qwen3_vl_moe": "qwen3_moe", "qwen3_vl": "qwen3", "qwen2_5_vl": "qwen2"}[model_type]
    )
    teacher = load_teacher(str(tmp_path), dtype=torch.float32)
    assert teacher.config.tie_word_embeddings == tied
    student = build_student(
        teacher.config, variant="rad_rwkv7", options={}, attention_layers=(0, 1), attention_rope=True
    )
    transplant(teacher, student)
    with torch.no_grad():
        wanted = whole(input_ids=tokens).logits
        torch.testing.assert_close(teacher(tokens).logits, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(student.eval()(tokens).logits, teacher(tokens).logits)


def as_qwen2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network with biases of zero."""
    zeros = {
        name.replace("weight", "bias"): torch.zeros(tensor.shape[0])
        for name, tensor in weights.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    return weights | zeros


def as_phi3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network with q, k, v in one matrix, and gate and up in another."""
    fused: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("self_attn.q_proj.weight"):
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            fused[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif name.endswith("mlp.gate_proj.weight"):
            fused[name.replace("gate", "gate_up")] = torch.cat([tensor, weights[name.replace("gate", "up")]])
        elif not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            fused[name] = tensor
    return fused


@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "phi3"])
@pytest.mark.parametrize("name", ["stories260K", "babyllama_tok361"])
def test_real_weights_give_their_golden_logits_through_other_classes(
    shared_data: Path, tmp_path: Path, name: str, model_type: str
) -> None:
    folder = shared_data / "teachers" / name
    raw = json.loads((folder / "config.json").read_text()) | {"model_type": model_type, "sliding_window": None}
    raw["architectures"] = None
    (tmp_path / "config.json").write_text(json.dumps(raw))
    change = {"qwen2": as_qwen2, "phi3": as_phi3}.get(model_type, dict)
    weights = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    golden = np.load(folder / "golden_logits.npz")
    input_ids = torch.from_numpy(golden["input_ids"]).long()
    teacher = load_teacher(str(tmp_path), dtype=torch.float64)
    assert type(teacher).__name__.lower().startswith(model_type)
    student = build_student(
        teacher.config,
        variant="rad_rwkv7",
        options={},
        attention_layers=tuple(range(teacher.config.num_hidden_layers)),
        attention_rope=True,
        dtype=torch.float64,
    )
    transplant(teacher, student)
    with torch.no_grad():
        logits = student.eval()(input_ids).logits
        assert torch.equal(logits, teacher(input_ids).logits)
    wanted = torch.from_numpy(golden["logits"]).double()
    torch.testing.assert_close(logits.reshape(wanted.shape), wanted, atol=1e-4, rtol=1e-4)
