"""The text part of a vision-language model, as the language model that it is when there is no picture.

Such a config nests the language model's own under `text_config`; its checkpoint nests the weights under another prefix.
With text alone the positions of the three axes of a multimodal RoPE are equal, and it is the plain one. A scale of the
logits is the language model's, also where transformers' class of the whole leaves it out (Command A Vision).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Only a matter of pictures.
_MULTIMODAL_ROPE = ("mrope_section", "mrope_interleaved")
# What the text part's code does without a switch in its config, and the plain family's code does with one.
_IMPLIED = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}


def is_nested(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is a vision-language model's."""
    return isinstance(raw.get("text_config"), Mapping)


def text_config(raw: Mapping[str, Any], model_type: str) -> PreTrainedConfig:
    """The config of the text part as one of the family `model_type`; its `text_part_of` is the whole's model type.

    Raises what transformers raises for a bad one.
    """
    whole = CONFIG_MAPPING[raw["model_type"]].from_dict({k: v for k, v in raw.items() if k != "auto_map"})
    text = whole.get_text_config()
    given = text.to_dict() | _IMPLIED.get(text.model_type, {})
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if given.get(name) is None:
            given[name] = raw.get(name)
    rope = {key: value for key, value in text.rope_parameters.items() if key not in _MULTIMODAL_ROPE}
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    # Some families' classes read a head_dim that is none of their declared fields.
    kept = CONFIG_MAPPING[model_type]().to_dict().keys() | {"head_dim"}
    kept -= {"model_type", "architectures", "transformers_version"}
    given = {key: value for key, value in given.items() if key in kept}
    given |= {"rope_parameters": rope, "tie_word_embeddings": bool(whole.tie_word_embeddings)}
    given["text_part_of"] = raw["model_type"]
    return CONFIG_MAPPING[model_type](**given)
