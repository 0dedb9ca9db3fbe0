"""The frozen softmax-attention model: supported families, and loading.

A family is one row of `model/teacher/families.py`, by its Hugging Face `model_type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from radlads.model.student.configuration import windowed_layers
from radlads.model.teacher.families import FAMILIES
from radlads.model.teacher.family import TeacherFamily
from radlads.model.teacher.refusals import refusal
from radlads.model.teacher.vision_language import is_nested, text_config
from radlads.model.teacher.weights import load_causal_model
from radlads.tasks.contracts.errors import UserError, error_text


class NoTeacherError(UserError):
    """Nothing is at the place that was named, or the hub does not answer."""


def list_families() -> list[str]:
    """The model types that can be converted: the rows of model/teacher/families.py."""
    return sorted(FAMILIES)


def find_family(config: PreTrainedConfig | Mapping[str, Any]) -> TeacherFamily:
    """The family of a config (or of a parsed config.json). Raises UserError with the reason if there is none.

    A vision-language config gets the family of its text part.
    """
    raw = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    text = raw.get("text_config")
    for part in (raw, text):
        if isinstance(part, Mapping) and (reason := refusal(part)):
            raise UserError(reason)
    model_type = raw["model_type"]
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    text_type = text.get("model_type") if isinstance(text, Mapping) else None
    for family in FAMILIES.values() if text_type else ():
        if text_type in (family.model_type, *family.text_of):
            return family
    hint = f" (its text part is '{text_type}')" if text_type else ""
    remote = "; its code comes with its weights, and mixers cannot be fitted to unknown code" * bool(
        raw.get("auto_map")
    )
    raise UserError(
        f"no teacher family for model_type '{model_type}'{hint}{remote}; known: {', '.join(list_families())}. "
        "A family is one row in model/teacher/families.py"
    )


def load_teacher(
    path: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a folder or hub id, frozen and in eval mode; of a vision-language model its text part.

    dtype: None keeps the checkpoint's. The model's code is transformers' own, even where the folder brings another, and
    its tensors are those that `open_teacher_weights` names, which transplant reads too. Raises UserError when there is
    nothing to load, no family, parts are missing, tensors do not fit the config, or values are not finite.
    """
    config = load_teacher_config(path, revision=revision)
    try:
        model = load_causal_model(path, config, dtype=dtype, revision=revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot load the teacher '{path}': {error_text(error)}") from error
    find_family(config).check(model)
    model.generation_config = load_generation_config(path, config, revision=revision)
    return model.to(device).eval().requires_grad_(False)


def load_teacher_config(path: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The typed config of a convertible teacher, without its weights; of a vision-language model its text part's.

    Raises UserError.
    """
    raw = read_config(path, revision=revision)
    try:
        return parse_teacher_config(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"cannot read the config of the teacher '{path}': {error_text(error)}") from error


def parse_teacher_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The typed config of a parsed config.json. Raises UserError without a family, and what transformers raises."""
    family = find_family(raw)
    if is_nested(raw):
        return text_config(raw, family.model_type)
    return CONFIG_MAPPING[family.model_type].from_dict({key: value for key, value in raw.items() if key != "auto_map"})


def load_generation_config(path: str, config: PreTrainedConfig, *, revision: str | None = None) -> GenerationConfig:
    """The teacher's generation defaults, or those in its config if it has no generation_config.json."""
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(config)


def teacher_warnings(
    config: PreTrainedConfig, *, attention_layers: Sequence[int] = (), untie_embeddings: bool = False
) -> list[str]:
    """Notes on this teacher for the plan, one line each.

    attention_layers: those that stay softmax. untie_embeddings: the student gets a head of its own.
    """
    lines = []
    if config.tie_word_embeddings and not untie_embeddings:
        lines.append(
            "the teacher's head is its embeddings (tied); RADLADS found that to end badly, for distillation then moves "
            "the embeddings too. student.untie_embeddings: true gives the student a head of its own "
            f"({config.vocab_size * config.hidden_size / 1e6:,.1f}M parameters more)"
        )
    confined = sorted(windowed_layers(config, find_family(config).window) & set(attention_layers))
    if confined and config.sliding_window < config.max_position_embeddings:
        lines.append(
            f"the kept attention layers {confined} see the last {config.sliding_window} tokens only, as in the "
            "teacher: such a window recalls nothing from further back"
        )
    for rope in rotary_settings(config.rope_parameters or {}):
        if rope.get("rope_type") not in ("longrope", "dynamic"):
            continue
        border = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        lines.append(
            f"the teacher's rotary positions change in contexts beyond {border} tokens ({rope['rope_type']}); "
            "a student trained on shorter contexts never learns those"
        )
    softmax, count = find_family(config).softmax_layers(config), config.num_hidden_layers
    if len(softmax) < count:
        lines.append(
            f"{count - len(softmax)} of {count} layers are linear attention in the teacher already and stay as they "
            f"are; only the layers {', '.join(map(str, softmax))} can be converted or kept"
        )
    if source := getattr(config, "text_part_of", None):
        lines.append(f"only the text part of this {source} model is converted; the student accepts no images")
    return lines


def rotary_settings(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One for all layers, or one for each kind of layer."""
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def read_config(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """The unmodified config.json, so that models unknown to transformers can be refused by name. Raises UserError;
    NoTeacherError where there is none."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, StrictDataclassError) as error:
        raise NoTeacherError(f"no teacher at '{path}': {error_text(error)}") from error
    if not raw or not isinstance(raw, dict):
        raise UserError(
            f"no teacher at '{path}': its config.json is not there or holds no settings; a teacher is a Hugging Face "
            "folder or hub id"
        )
    return raw
