"""Config of a converted model: the teacher's whole config, plus everything that the mixers need."""

from __future__ import annotations

import copy
from typing import Any

import transformers

from radlads.model.student.releases import check_release

check_release(transformers.__version__)  # before any use of features that older releases lack

# Properties of a file, not of the architecture: they would become outdated, or name a path on another machine.
_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map", "architectures")
# Keys of the teacher's config only; generic tools would read them as this model's.
_OF_BACKBONE = ("rope_parameters", "rope_scaling", "layer_types", "sliding_window", "mlp_layer_types")
# Repeated at the top level, where generic tools read them.
_MIRRORED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
)


FIRST_LAYER = "first_layer"
FIRST_MIXER = "first_mixer"


class RadladsConfig(transformers.PreTrainedConfig):
    """Everything that defines a converted model.

    teacher: the teacher's Hugging Face config, model_type included. family: where that family keeps its parts.
    variant, options, constants: the mixer and all that defines its function, ranks written out. initial_values: how its
    parameters started; of no meaning once there are weights. attention_layers: layers that stay softmax;
    attention_rope: whether those use rotary positions. attention_log_scale: a, where those multiply the scores of a
    query at position t by log_a(t + a); None: not at all. Layers that the teacher has linear are not among them.
    first_values: the layer whose values (and keys) mixers blend into their own: the first softmax layer of the teacher,
    also where it stays attention (`first_layer`); or the first converted one (`first_mixer`, in configs without the
    key). Both are the same layer where that one is converted.
    """

    model_type = "radlads"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        teacher: dict[str, Any] | None = None,
        family: dict[str, Any] | None = None,
        variant: str = "rad_rwkv7",
        options: dict[str, Any] | None = None,
        constants: dict[str, float | str] | None = None,
        initial_values: dict[str, Any] | None = None,
        attention_layers: tuple[int, ...] | list[int] = (),
        attention_rope: bool = False,
        attention_log_scale: int | None = None,
        first_values: str = FIRST_MIXER,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        teacher = {key: value for key, value in (teacher or {}).items() if key not in _NOT_ARCHITECTURE}
        self.family = dict(family or {})
        self.variant = variant
        self.options = dict(options or {})
        self.constants = dict(constants or {})
        self.initial_values = dict(initial_values or {})
        self.attention_layers = sorted(attention_layers)
        self.attention_rope = attention_rope
        if attention_log_scale is not None and attention_log_scale < 2:
            raise ValueError(f"attention_log_scale is {attention_log_scale}, and must be 2 or more")
        self.attention_log_scale = attention_log_scale
        if first_values not in (FIRST_LAYER, FIRST_MIXER):
            raise ValueError(f"first_values is '{first_values}', and must be {FIRST_LAYER} or {FIRST_MIXER}")
        self.first_values = first_values
        self.use_cache = use_cache
        if kwargs.get("vocab_size") is not None:  # changed by resize_token_embeddings, which only changes this level
            teacher["vocab_size"] = kwargs["vocab_size"]
        for name in _MIRRORED:
            if teacher.get(name) is not None:
                setattr(self, name, teacher[name])
            kwargs.pop(name, None)
        if teacher:
            kinds = ("linear_attention", "full_attention")
            self.layer_types = [kinds[layer in self.attention_layers] for layer in range(teacher["num_hidden_layers"])]
            kwargs.pop("layer_types", None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, teacher.get(name))
        kwargs.setdefault("tie_word_embeddings", bool(teacher.get("tie_word_embeddings", False)))
        super().__init__(**kwargs)
        self.teacher = teacher

    def __getattr__(self, name: str) -> Any:
        """Attributes that only the teacher's config has (experts, soft caps, scales), for its family's code."""
        teacher = self.__dict__.get("teacher", {})
        if name.startswith("_") or name not in teacher or name in _OF_BACKBONE:
            raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")
        return teacher[name]

    def windowed_layers(self) -> set[int]:
        """Layers whose attention has a sliding window in the teacher; kept layers keep it."""
        if self.teacher.get("sliding_window", "as its class says") is None:
            return set()  # without making a config, which costs as much time as two layers
        return windowed_layers(self.teacher_config(), self.family.get("window", "none"))

    def softmax_layers(self) -> list[int]:
        """Layers whose attention is softmax in the teacher; the others are linear there and stay so."""
        linear = self.family.get("linear_attention")
        return softmax_layers(self.num_hidden_layers, linear, self.teacher.get("layer_types"))

    def converted_layers(self) -> list[int]:
        """Layers whose softmax attention is replaced by a mixer."""
        return [i for i in self.softmax_layers() if i not in self.attention_layers]

    def first_layer(self) -> int | None:
        """The layer that hands on first values; None where no layer is converted."""
        converted = self.converted_layers()
        if not converted:
            return None
        return self.softmax_layers()[0] if self.first_values == FIRST_LAYER else converted[0]

    def first_attention(self) -> int | None:
        """The layer that hands on first values if that layer stays attention; else None."""
        return next((layer for layer in self.attention_layers if layer == self.first_layer()), None)

    def teacher_config(self) -> transformers.PreTrainedConfig:
        """The teacher's config as an instance of its own class."""
        raw = copy.deepcopy(self.teacher)
        raw |= {"vocab_size": self.vocab_size, "tie_word_embeddings": self.tie_word_embeddings}
        config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        if getattr(self, "_attn_implementation", None) is not None:
            config._attn_implementation = self._attn_implementation
        # Tensor and pipeline parallel plans split attention's projections, for which a mixer has no plan.
        config.base_model_tp_plan = config.base_model_pp_plan = config.base_model_ep_plan = None
        return config


def softmax_layers(num_layers: int, linear_attention: str | None, layer_types: list[str] | None) -> list[int]:
    """Layers that have softmax attention. linear_attention: the family's name of the attention that others have, None
    where there are no others; which are the others is in `layer_types`."""
    if linear_attention is None or layer_types is None:
        return list(range(num_layers))
    return [i for i in range(num_layers) if layer_types[i] != "linear_attention"]


def windowed_layers(config: transformers.PreTrainedConfig, rule: str) -> set[int]:
    """Layers with a sliding window: `none`; `all`, where the config gives a window; or by its `layer_types`.

    A family's code determines which of the three applies, and may ignore its config.
    """
    layers = range(config.num_hidden_layers)
    if rule == "none" or getattr(config, "sliding_window", None) is None:
        return set()
    kinds = getattr(config, "layer_types", None) if rule == "layer_types" else None
    return {i for i in layers if kinds is None or kinds[i] == "sliding_attention"}
