"""Real config.json files on the meta device: taken with the right sizes, or refused for what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from radlads.model.student.load import build_student
from radlads.model.teacher.load import find_family, parse_teacher_config
from radlads.tasks.contracts.errors import UserError

# As published, or as counted when the file was made; `count` below derives each from the config's own numbers.
KNOWN = {
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-1B-Instruct-pruned-iShrink": 1_114_900_480,
    "Minueza-32M-Mistral": 32_792_760,
    "Mistral-Small-3-24B": 23_572_403_200,
    "Phi-3.5-mini": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "Phi-4-mini": 3_836_021_760,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-VL-MoE-235B": 144_590_278_144,
    "Reka-Flash-3": 20_905_482_240,
    "Reka-Flash-3.1": 20_905_482_240,
    "TinyStories-656K": 656_000,
    "arnir0-Tiny-LLM-MQA": 12_988_992,
    "llm-jp-1.8b": 1_867_614_208,
}
CONVERTED = {
    "RWKV7-World-0.1B",
    "liger-mistral-7b",
    "liger-qwen25-7b",
    "liger-qwen3-8b",
    "lolcats-llama3-8b",
    "rwkv_hybrid-ARWKV-0.5B-from-Qwen2.5-0.5B",
    "rwkv_hybrid-ARWKV-7B-from-Qwen2.5-7B",
}
FAMILY_OF_TEXT = {"qwen3_vl_moe": "qwen3_moe"}


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "configs" / f"{name}.json").read_text(encoding="utf-8"))


def count(raw: dict[str, Any]) -> int:
    """Parameters of a Llama-like model by arithmetic, from the raw numbers of its config.json alone."""
    text = raw.get("text_config", raw)
    width, vocab, heads = text["hidden_size"], text["vocab_size"], text["num_attention_heads"]
    kind = text["model_type"]
    head = text.get("head_dim") or width // heads
    q, kv = heads * head, text["num_key_value_heads"] * head
    attention = width * (q + 2 * kv) + q * width
    attention += q + 2 * kv if kind == "qwen2" else 0
    attention += 2 * head if kind.startswith("qwen3") else 0
    mlp = 3 * width * text["intermediate_size"]
    if "num_experts" in text:
        mlp = text["num_experts"] * (3 * width * text["moe_intermediate_size"] + width)
    embeddings = vocab * width * (1 if raw["tie_word_embeddings"] else 2)
    return embeddings + text["num_hidden_layers"] * (attention + mlp + 2 * width) + width


@pytest.mark.parametrize("name", KNOWN)
def test_real_teachers_have_their_published_sizes(shared_data: Path, name: str) -> None:
    raw = read(shared_data, name)
    config = parse_teacher_config(raw)
    family = find_family(raw)
    assert config.model_type == family.model_type == FAMILY_OF_TEXT.get(raw["model_type"], raw["model_type"])
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
    family.check(teacher)
    assert sum(p.numel() for p in teacher.parameters()) == count(raw) == KNOWN[name]
    assert config.tie_word_embeddings == raw["tie_word_embeddings"]


@pytest.mark.parametrize("name", KNOWN)
def test_students_of_real_teachers_keep_all_but_what_mixers_add(shared_data: Path, name: str) -> None:
    config = parse_teacher_config(read(shared_data, name))
    kept = (config.num_hidden_layers - 1,)
    with torch.device("meta"):
        student = build_student(
            config, variant="rad_rwkv7", options={}, attention_layers=kept, attention_rope=False, dtype=torch.bfloat16
        )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    added = sum(
        p.numel()
        for mixer in student.mixers().values()
        for name, p in mixer.named_parameters()
        if name.split(".")[0] not in names
    )
    assert sum(p.numel() for p in student.parameters()) - added == KNOWN[name]
    # The config that the student carries rebuilds the teacher's frequencies exactly, scaled types included.
    again = type(student.config).from_dict(json.loads(student.config.to_json_string()))
    ours, theirs = again.teacher_config(), config
    assert ours.rope_parameters == theirs.rope_parameters
    assert getattr(ours, "sliding_window", None) == getattr(theirs, "sliding_window", None)
    assert again.windowed_layers() == student.config.windowed_layers()


@pytest.mark.parametrize("name", sorted(CONVERTED))
def test_converted_models_are_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(UserError, match="linear-attention model already; give the softmax model behind it") as caught:
        find_family(read(shared_data, name))
    assert "\n" not in str(caught.value)


def test_every_config_at_hand_is_in_one_list(shared_data: Path) -> None:
    assert {path.stem for path in (shared_data / "configs").glob("*.json")} == CONVERTED | KNOWN.keys()
