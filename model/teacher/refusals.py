"""Reasons why teachers cannot be converted; read from a parsed config.json before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# Words in the model type or class name of models whose attention was replaced already, or that have none.
_CONVERTED = re.compile(
    r"radlads|rwkv|liger|lolcats|hedgehog|linear_llama|mamba|retnet|gated_?delta|delta_?net|(?<![a-z])(gla|gsa|kda)(?![a-z])"
)
# Architectures whose attention mixers cannot replace, or that no family describes.
_OTHER_BLOCKS = {
    (
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "kimi_k2", "longcat_flash", "mistral4", "youtu",
        "glm4_moe_lite", "glm_moe_dsa",
    ): "its keys and values come from one latent (MLA), so there are no k and v projections to transplant",
    (
        "jamba", "bamba", "zamba", "zamba2", "nemotron_h", "falcon_h1", "granitemoehybrid", "recurrent_gemma", "lfm2",
        "lfm2_moe", "olmo_hybrid", "minimax",
    ): "it is a hybrid already: most of its layers are state-space, convolution or linear-attention layers",
    ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"): (
        "it has both gated delta nets and experts, some of them shared, which no family describes; dense Qwen3.5 can "
        "be converted"
    ),
    ("gemma2",): "it caps its attention scores and its logits, which neither mixers nor the distillation loss do",
    ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"): (
        "its layers share keys and values, or have inputs beside the residual stream"
    ),
    ("gpt2", "gpt_neox", "gptj", "phi", "falcon", "bloom", "opt", "mpt"): (
        "its blocks have no RMSNorm, gated MLP and separate residuals as Llama's have"
    ),
    ("gpt_oss",): "its attention has learned sinks, which no mixer has a place for",
}  # fmt: skip
# Families some of whose layers are linear attention, and stay so; at least one is not.
_SOME_LINEAR = ("qwen3_5_text",)
# The largest sizes of a config, far above any published model: building begins with loops over some of them.
_MOST = {
    "num_hidden_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "num_experts": 8192,
    "num_local_experts": 8192,
    "num_experts_per_tok": 8192,
    "sliding_window": 1 << 31,
}
# Numbers among the settings of rotary positions; `factor` is at least 1.
_ABOVE_ZERO = (
    "rope_theta", "factor", "attention_factor", "partial_rotary_factor", "original_max_position_embeddings",
    "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
)  # fmt: skip
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window", "intermediate_size", "moe_intermediate_size"}


def size_fault(raw: Mapping[str, Any]) -> str | None:
    """The first fault in the numbers and lists of a config, in one line, before anything is built from them."""
    for name, most in _MOST.items():
        value = raw.get(name, 1)
        if value is None and name in _MAY_BE_NULL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            return f"{name} is {repr(value)[:40]} in its config; a whole number from 1 to {most:,} is needed"
    for name in ("rms_norm_eps", "layer_norm_eps", "rope_theta"):
        # transformers reports values that are not numbers.
        if isinstance(value := raw.get(name), int | float) and not 0 < value < math.inf:
            return f"{name} is {value} in its config; a number above 0 is needed"
    for name in ("rope_parameters", "rope_scaling"):  # today's name, and the one of earlier releases
        if isinstance(positions := raw.get(name), Mapping):  # of all layers, or of each kind of layer
            kinds = {f"{name}.{kind}.": part for kind, part in positions.items() if isinstance(part, Mapping)}
            for place, part in {f"{name}.": positions, **kinds}.items():
                if fault := _rotary_fault(part):
                    return f"{place}{fault} is needed"
    for name in ("layer_types", "architectures"):
        value = raw.get(name) or ()
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            return f"{name} is {repr(value)[:40]} in its config; a list of texts is needed"
    return None


def _rotary_fault(part: Mapping[str, Any]) -> str | None:
    """What is wrong with one kind of layer's rotary positions; transformers only warns, and computes nonsense."""
    numbers: dict[str, float] = {}
    for name in _ABOVE_ZERO:
        value = part.get(name)
        if value is None:
            continue
        if not _is_number(value) or value <= 0 or (name == "factor" and value < 1):
            needed = "of at least 1" if name == "factor" else "above 0"
            return f"{name} is {repr(value)[:40]} in its config; a number {needed}"
        numbers[name] = value
    if (share := numbers.get("partial_rotary_factor", 1)) > 1:
        return f"partial_rotary_factor is {share} in its config; a number above 0 and at most 1"
    slow, fast = (numbers.get(name, default) for name, default in (("beta_slow", 1), ("beta_fast", 32)))
    if fast < slow:
        return f"beta_fast is {fast} in its config; a number of at least beta_slow ({slow})"
    low, high = numbers.get("low_freq_factor"), numbers.get("high_freq_factor")
    if low is not None and high is not None and high <= low:
        return f"high_freq_factor is {high} in its config; a number above low_freq_factor ({low})"
    for name in ("short_factor", "long_factor"):
        value = part.get(name)
        if value is not None and not isinstance(value, list | tuple):
            return f"{name} is {repr(value)[:40]} in its config; a list of numbers above 0"
        wrong = [one for one in value or () if not _is_number(one) or one <= 0]
        if wrong:
            return f"{name} has {repr(wrong[0])[:40]} in its config; a list of numbers above 0"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def token_fault(settings: Mapping[str, Any], vocab_size: int, where: str) -> str | None:
    """The first special token of a config, or of generation settings, that is not in the vocabulary. -1: none."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, int) and not -1 <= one < vocab_size:
                return f"{name} is {one} in its {where}, but its vocabulary has the ids 0 to {vocab_size - 1}"
    return None


# Formats of floating-point weights; weights in any other format are quantised.
_FULL_PRECISION = ("F64", "F32", "F16", "BF16")
_QUANTISED = (
    "quantised; give the full-precision model that they were made from, or a GGUF file (teacher: {path: model.gguf}), "
    "which is dequantised once"
)


def stored_refusal(dtype: str) -> str | None:
    """Why a tensor stored as `dtype` (the format's name) cannot be a weight; None if it can."""
    return None if dtype in _FULL_PRECISION else f"is kept as {dtype}: the weights are {_QUANTISED}"


def named_weights(raw: Mapping[str, Any]) -> str | None:
    """The fault of a config that names a file of weights, which only transformers would read."""
    if not raw.get("transformers_weights"):
        return None
    return (
        f"config.json names its weights (transformers_weights: {str(raw['transformers_weights'])[:80]!r}); they are "
        "read from model.safetensors or its index alone: rename them and remove the entry"
    )


def refusal(raw: Mapping[str, Any]) -> str | None:
    """Why the model of this config cannot be a teacher, in one line; None if it can."""
    model_type = str(raw.get("model_type") or "")
    if not model_type:
        return "the teacher's config.json has no model_type, so its architecture is unknown"
    if fault := size_fault(raw):
        return fault
    names = [model_type, *(raw.get("architectures") or ())]
    if any(_CONVERTED.search(_spaced(name)) for name in names):
        return f"the teacher ({', '.join(names)}) is a linear-attention model already; give the softmax model behind it"
    for types, reason in _OTHER_BLOCKS.items():
        if model_type in types:
            return f"no teacher family for model_type '{model_type}': {reason}"
    kinds = set(raw.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if model_type in _SOME_LINEAR and "full_attention" in (raw.get("layer_types") or ("full_attention",)):
        kinds -= {"linear_attention"}
    if kinds:
        kinds = ", ".join(sorted(set(raw["layer_types"])))
        return (
            f"the teacher mixes kinds of layers ({kinds}); only softmax attention, full or windowed, can be converted"
        )
    if raw.get("use_bidirectional_attention"):
        return "the teacher's attention sees later tokens too (use_bidirectional_attention); mixers are causal"
    if raw.get("final_logit_softcapping"):
        return "the teacher caps its logits (final_logit_softcapping), which the distillation loss does not"
    if raw.get("quantization_config"):
        return f"the teacher's weights are {_QUANTISED}"
    if reason := named_weights(raw):
        return f"the teacher's {reason}"
    return None


def _spaced(name: str) -> str:
    """LigerQwen2GLAForCausalLM → liger_qwen2_gla_for_causal_lm, so that short words match whole words only."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return parted.lower()
