"""The frozen softmax-attention model: which families can be taught from, and how one is loaded.

A family is one file of `model/teacher/families/`, named after its Hugging Face `model_type`: one `TeacherFamily`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from radlads.model.student.configuration import windowed_layers
from radlads.model.teacher.refusals import refusal
from radlads.model.teacher.vision_language import is_nested, text_config
from radlads.model.teacher.weights import load_causal_model
from radlads.tasks.contracts.errors import UserError, error_text


@dataclass(frozen=True)
class TeacherFamily:
    """Where the parts of a family's transformers model are, all relative to the backbone (`model.model`) or to a layer.

    Sizes and biases are not here: they are read from the modules.
    """

    model_type: str
    layers: str = "layers"
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str | None = None
    """One projection with the rows of q, k and v, in this order; then q, k and v name those of the student alone."""
    q_norm: str | None = None
    k_norm: str | None = None
    window: Literal["none", "all", "layer_types"] = "none"
    """Which layers obey the config's `sliding_window`."""
    text_of: tuple[str, ...] = ()
    """Model types of vision-language text parts that compute the same when there is no picture."""

    def names(self) -> dict[str, str | None]:
        """The part names as a plain mapping, as the student's config stores them."""
        return {key: value for key, value in asdict(self).items() if key not in ("model_type", "text_of")}

    def attention_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The softmax attention module of every layer of a loaded teacher."""
        layers = getattr(backbone(model), self.layers)
        return [getattr(layer, self.attention) for layer in layers]

    def check(self, model: PreTrainedModel) -> None:
        """Raise UserError unless every part is where this family says it is."""
        inner = backbone(model)
        missing = [
            name for name in (self.layers, self.embeddings, self.final_norm, self.rotary) if not hasattr(inner, name)
        ]
        for index, layer in enumerate(getattr(inner, self.layers, ())):
            parts = (self.attention, self.input_norm, self.mlp_norm, self.mlp)
            missing += [f"layer {index}: {name}" for name in parts if not hasattr(layer, name)]
            attention = getattr(layer, self.attention, None)
            projections = (self.qkv, self.o) if self.qkv else (self.q, self.k, self.v, self.o)
            wanted = [*projections, *filter(None, (self.q_norm, self.k_norm))]
            missing += [f"layer {index}: {self.attention}.{name}" for name in wanted if not hasattr(attention, name)]
        if missing:
            raise UserError(
                f"this model lacks what the family '{self.model_type}' expects: {', '.join(missing[:5])}; "
                "it is another architecture under this name, or a new transformers release moved the parts"
            )


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model under the language-model head. Raises UserError where there is none."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise UserError(f"{type(model).__name__} has no backbone `model`; a causal language model is needed")
    return inner


def list_families() -> list[str]:
    """The model types that can be converted: the files of model/teachers."""
    package = importlib.import_module("radlads.model.teacher.families")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_family(config: PreTrainedConfig | Mapping[str, Any]) -> TeacherFamily:
    """The family of a config (or of a parsed config.json). Raises UserError with the reason why there is none.

    A vision-language config gets the family of its text part.
    """
    raw = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    text = raw.get("text_config")
    for part in (raw, text):
        if isinstance(part, Mapping) and (reason := refusal(part)):
            raise UserError(reason)
    model_type, known = raw["model_type"], list_families()
    if model_type in known:
        return _load_family(model_type)
    text_type = text.get("model_type") if isinstance(text, Mapping) else None
    for name in known if text_type else ():
        family = _load_family(name)
        if text_type in (name, *family.text_of):
            return family
    hint = f" (its text part is '{text_type}')" if text_type else ""
    remote = "; its code comes with its weights, and mixers cannot be fitted to unknown code" * bool(
        raw.get("auto_map")
    )
    raise UserError(
        f"no teacher family for model_type '{model_type}'{hint}{remote}; known: {', '.join(known)}. "
        "A family is one file in model/teachers"
    )


def _load_family(model_type: str) -> TeacherFamily:
    family = importlib.import_module(f"radlads.model.teacher.families.{model_type}").FAMILY
    if not isinstance(family, TeacherFamily) or family.model_type != model_type:
        raise TypeError(
            f"model/teacher/families/{model_type}.py must define FAMILY = TeacherFamily(model_type='{model_type}', ...)"
        )
    return family


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
    """The teacher's generation defaults, or what its config says where it has no generation_config.json."""
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(config)


def teacher_warnings(
    config: PreTrainedConfig, *, attention_layers: Sequence[int] = (), untie_embeddings: bool = False
) -> list[str]:
    """What a user should know before converting this teacher, one line each; for the plan.

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
    rope = config.rope_parameters or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        border = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        lines.append(
            f"the teacher's rotary positions turn otherwise in contexts beyond {border} tokens ({rope['rope_type']}); "
            "a student that is trained below that never saw those"
        )
    if source := getattr(config, "text_part_of", None):
        lines.append(f"only the text part of this {source} model is converted; the student sees no pictures")
    return lines


def read_config(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """config.json as it is, so that models that transformers does not know can be refused by name. Raises UserError."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, StrictDataclassError) as error:
        raise UserError(f"no teacher at '{path}': {error_text(error)}") from error
    if not raw or not isinstance(raw, dict):
        raise UserError(
            f"no teacher at '{path}': its config.json is not there or holds no settings; a teacher is a Hugging Face "
            "folder or hub id"
        )
    return raw
