"""The frozen softmax-attention model: which families can be taught from, and how one is loaded.

A family is one file of `model/teachers/`, named after its Hugging Face `model_type`, that holds one `TeacherFamily`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from radlads.tasks.job import UserError

# Words in the model type or class name of models whose attention was replaced already, or that never had one.
_CONVERTED = ("radlads", "rwkv", "liger", "lolcats", "linear_llama", "mamba", "gla", "gated_deltanet", "kda")


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
    q_norm: str | None = None
    k_norm: str | None = None

    def names(self) -> dict[str, str | None]:
        """The part names as a plain mapping, as the student's config stores them."""
        return {key: value for key, value in asdict(self).items() if key != "model_type"}

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
            wanted = [self.q, self.k, self.v, self.o, *filter(None, (self.q_norm, self.k_norm))]
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
    package = importlib.import_module("radlads.model.teachers")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_family(config: PreTrainedConfig | Mapping[str, Any]) -> TeacherFamily:
    """The family of a config (or of a parsed config.json). Raises UserError with the reason why there is none."""
    raw = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    model_type = str(raw.get("model_type") or "")
    names = [model_type, *(raw.get("architectures") or ())]
    known = list_families()
    if not model_type:
        raise UserError("the teacher's config.json has no model_type, so its architecture cannot be told")
    if any(word in name.lower() for name in names for word in _CONVERTED):
        raise UserError(
            f"the teacher ({', '.join(names)}) is a linear-attention model already; give the softmax model behind it"
        )
    if model_type not in known:
        nested = raw.get("text_config")
        hint = f" (its text part is '{nested.get('model_type')}')" if isinstance(nested, Mapping) else ""
        raise UserError(
            f"no teacher family for model_type '{model_type}'{hint}; known: {', '.join(known)}. "
            "A family is one file in model/teachers"
        )
    if raw.get("quantization_config"):
        raise UserError("the teacher's weights are quantised; give the full-precision model that they were made from")
    family = importlib.import_module(f"radlads.model.teachers.{model_type}").FAMILY
    if not isinstance(family, TeacherFamily) or family.model_type != model_type:
        raise TypeError(
            f"model/teachers/{model_type}.py must define FAMILY = TeacherFamily(model_type='{model_type}', ...)"
        )
    return family


def load_teacher(
    path: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a folder or hub id, frozen and in eval mode.

    dtype: None keeps the checkpoint's. Raises UserError when there is nothing to load, no family, or parts are missing.
    """
    raw = read_config(path, revision=revision)
    family = find_family(raw)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot load the teacher '{path}': {_one_line(error)}") from error
    family.check(model)
    return model.to(device).eval().requires_grad_(False)


def load_teacher_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The typed config of a convertible teacher, without its weights. Raises UserError."""
    find_family(read_config(path, revision=revision))
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot read the config of the teacher '{path}': {_one_line(error)}") from error


def read_config(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """config.json as it is, so that models that transformers does not know can be refused by name. Raises UserError."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"no teacher at '{path}': {_one_line(error)}") from error
    if not raw:
        raise UserError(f"no config.json at '{path}'; a teacher is a Hugging Face folder or hub id")
    return raw


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
