"""The text part of a vision-language model, as a plain language model without images.

Such a config nests the language model's own under `text_config`; its checkpoint nests the weights under another prefix.
For text alone the positions of the three axes of a multimodal RoPE are equal, so it equals the plain RoPE. A scale of
the logits applies even where transformers' class of the whole model omits it (Command A Vision).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Keys that only affect images.
_MULTIMODAL_ROPE = ("mrope_section", "mrope_interleaved")
# Config switches that the plain family's code needs for behaviour that the text part's code always has.
_IMPLIED = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}


def is_nested(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is of a vision-language model."""
    return isinstance(raw.get("text_config"), Mapping)


def text_config(raw: Mapping[str, Any], model_type: str) -> PreTrainedConfig:
    """The config of the text part as one of the family `model_type`; its `text_part_of` is the whole's model type.

    Raises the errors of transformers for an invalid one.
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
    # Some families' classes read a head_dim that is not a declared field.
    kept = CONFIG_MAPPING[model_type]().to_dict().keys() | {"head_dim"}
    kept -= {"model_type", "architectures", "transformers_version"}
    given = {key: value for key, value in given.items() if key in kept}
    given |= {"rope_parameters": rope, "tie_word_embeddings": bool(whole.tie_word_embeddings)}
    given["text_part_of"] = raw["model_type"]
    return CONFIG_MAPPING[model_type](**given)
