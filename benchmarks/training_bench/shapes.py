"""The public shapes of benchmarks/training.py's random teachers, and the FLOP of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from radlads.tasks.contracts.recipe.training import Training, runs_teacher
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.jobs.train.flops import count_multiplied, trained_matrices

_QWEN2 = {
    "model_type": "qwen2", "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
# The published configs, without token ids.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": _QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": _QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "reka-flash-21b": {
        "model_type": "llama", "hidden_size": 6144, "intermediate_size": 19648, "num_hidden_layers": 44,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 96, "vocab_size": 100352,
        "rms_norm_eps": 1e-5, "rope_theta": 8e6, "max_position_embeddings": 98304, "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
    },
    "qwen2.5-32b": _QWEN2 | {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "qwen2.5-72b": _QWEN2 | {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
# Which shape a shipped recipe's teacher has; Qwen3-14B is Qwen3-8B but for these.
SHAPES["qwen3-14b"] = SHAPES["qwen3-8b"] | {
    "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
}  # fmt: skip
SHAPE_OF_TEACHER = {
    "RekaAI/reka-flash-3": "reka-flash-21b",
    "RekaAI/reka-flash-3.1": "reka-flash-21b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
    "Qwen/Qwen2.5-32B-Instruct": "qwen2.5-32b",
    "Qwen/Qwen2.5-72B-Instruct": "qwen2.5-72b",
}


@dataclass(frozen=True)
class CaseFlops:
    """FLOP of one token of a stage."""

    by_rule: float
    """distill: 8 N, finetune: 6 N, N all parameters of the teacher; align: `counted`, because no rule exists."""
    counted: float
    """What `mfu` of a training job counts (tasks/jobs/train/flops.py)."""


def count_flops(section: Training, stage: str, teacher: Any, student: Any) -> CaseFlops:
    """teacher, student: on any device, meta among them."""
    taught, layerwise = runs_teacher(stage, section), stage_info(stage).layerwise

    def trains(name: str) -> bool:
        group = student.parameter_group(name)
        return group == "mixer" if layerwise else group not in section.freeze

    trained = trained_matrices(student, trains)
    of = count_multiplied(teacher, student)
    counted = of.stage_flops(section.context, trained=trained, taught=taught, layerwise=layerwise).total
    every = sum(parameter.numel() for parameter in teacher.parameters())
    rule = counted if layerwise else (8.0 if taught else 6.0) * every
    return CaseFlops(rule, counted)
