"""The public shapes of benchmarks/training.py's random teachers, and the FLOP of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from radlads.model.student.modeling import RadladsForCausalLM

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
# Of a mixer: the maps whose input is the layer's own input, which has no gradient in align.
_OF_INPUT = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "w1", "a1", "v1", "k1", "g1")


@dataclass(frozen=True)
class Flops:
    """FLOP of one token of a stage."""

    by_rule: float
    """distill: 8 N, finetune: 6 N, N all parameters of the teacher; align: `by_matrix`, because no rule exists."""
    by_matrix: float
    """Of every matrix that a token is multiplied with: 2 forward, 2 for the gradient of its input, 2 for its own where
    it trains. Neither softmax attention's products of tokens with tokens, nor the recurrence, nor recomputation."""


def count_flops(stage: str, teacher: nn.Module, student: RadladsForCausalLM, frozen: tuple[str, ...]) -> Flops:
    """teacher, student: on any device, meta among them. frozen: the section's `freeze`."""
    tied = student.config.tie_word_embeddings
    teacher_matrices = _teacher_matrices(teacher, with_head=stage == "distill")
    every = sum(parameter.numel() for parameter in teacher.parameters())
    if stage == "align":
        exact = 2.0 * teacher_matrices + _mixer_flops(student)
        return Flops(exact, exact)
    exact = 2.0 * teacher_matrices if stage == "distill" else 0.0
    for name, parameter in student.named_parameters():
        group = student.parameter_group(name)
        if parameter.dim() != 2 or (group == "embeddings" and not tied):
            continue
        trained = group not in frozen or (group == "embeddings" and "head" not in frozen)
        exact += (6.0 if trained else 4.0) * parameter.numel()
    return Flops((8.0 if stage == "distill" else 6.0) * every, exact)


def _teacher_matrices(teacher: nn.Module, *, with_head: bool) -> int:
    """Parameters that a token is multiplied with; a tied head is the embeddings."""
    total = sum(p.numel() for name, p in teacher.named_parameters() if p.dim() == 2 and ".layers." in name)
    return total + (teacher.get_output_embeddings().weight.numel() if with_head else 0)


def _mixer_flops(student: RadladsForCausalLM) -> float:
    flops = 0.0
    for mixer in student.mixers().values():
        for name, parameter in mixer.named_parameters():
            if parameter.dim() == 2:
                flops += (4.0 if name in _OF_INPUT else 6.0) * parameter.numel()
    return flops
