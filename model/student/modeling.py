"""The converted model: the teacher family's own transformers model, with attention replaced by mixers in most layers.

Norms, embeddings, MLPs, masks, rotary positions, the head and the loss are the family's code. A layer's attention is a
mixer with an attention's signature; shared data of mixers is passed in one keyword (forward_pass.py).
"""

from __future__ import annotations

import copy
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import can_return_tuple

from radlads.model.mixers.shared.attention_shape import AttentionShape, read_attention_shape
from radlads.model.mixers.shared.mixer import Mixer
from radlads.model.mixers.shared.registry import mixer_class
from radlads.model.student.cache import RadladsCache, RecurrentLayer
from radlads.model.student.configuration import RadladsConfig
from radlads.model.student.decoding.fast_modules import use_fast_modules
from radlads.model.student.decoding.generation_loop import (
    RECORDINGS,
    forget_recordings,
    prompt_piece,
    sample_recorded,
)
from radlads.model.student.first_values import hand_on_first_values
from radlads.model.student.forward_pass import ForwardPass
from radlads.model.student.kept_attention import keep_attention, keep_linear_attention
from radlads.model.student.precision import remember_buffers, restore_buffers
from radlads.model.student.releases import cache_keyword, check_calls


def build_mixer(config: RadladsConfig, layer: int, shape: AttentionShape) -> Mixer:
    """A fresh mixer for a layer, on torch's default device and in its default dtype."""
    return mixer_class(config.variant)(
        shape,
        SimpleNamespace(**config.initial_values | config.options),
        layer=layer,
        num_layers=config.num_hidden_layers,
        first=layer == config.first_layer(),
    )


def convert_backbone(backbone: PreTrainedModel, config: RadladsConfig) -> None:
    """Replace attention in a family's backbone, in place, in every layer that the config does not keep as attention.

    Raises ValueError if this code's constants differ from those that the model was made with, and ImportError
    under a release of transformers that calls the parts differently.
    """
    constants = mixer_class(config.variant).CONSTANTS
    if dict(config.constants) != constants:
        raise ValueError(
            f"this model was made with the {config.variant} constants {config.constants}, but this code has {constants}"
        )
    parts, softmax = SimpleNamespace(**config.family), config.softmax_layers()
    for i, layer in enumerate(getattr(backbone, parts.layers)):
        if i not in softmax:
            keep_linear_attention(getattr(layer, parts.linear_attention))
            continue
        attention = getattr(layer, parts.attention)
        if i == softmax[0]:
            check_calls(backbone, layer, attention)
        if i in config.attention_layers:
            keep_attention(attention, config, i)
            hand_on_first_values(attention, config, i)
        else:
            shape = read_attention_shape(attention, parts, getattr(backbone.config, "rms_norm_eps", 1e-6))
            setattr(layer, parts.attention, build_mixer(config, i, shape))
    if config.converted_layers():
        use_fast_modules(backbone)
    backbone.register_forward_pre_hook(ForwardPass(backbone, config, parts.layers), with_kwargs=True)


@lru_cache
def _of_family(generic: type[RadladsForCausalLM], family: type[PreTrainedModel]) -> type[RadladsForCausalLM]:
    own = {"__module__": generic.__module__, "_generic": generic, "_family": family}
    return type(generic.__name__, (generic, family), own)


def _rebuild(generic: type[RadladsForCausalLM], family: type[PreTrainedModel]) -> RadladsForCausalLM:
    return object.__new__(_of_family(generic, family))


class RadladsForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model. With no layer converted (and `attention_rope`) its logits equal the teacher's bit for bit.

    An instance is also one of the family's own class (`Qwen3ForCausalLM`, ...), whose `forward` and `__init__` it uses.
    """

    config_class = RadladsConfig
    base_model_prefix = "model"
    _is_stateful = False  # of transformers: whether nothing can be taken back, which a RadladsCache can
    _generic: type[PreTrainedModel] | None = None
    _family: type[PreTrainedModel] | None = None

    def __new__(cls, config: RadladsConfig | None = None, *args: Any, **kwargs: Any) -> RadladsForCausalLM:
        if cls._generic is not None or config is None:
            return object.__new__(cls)
        return object.__new__(_of_family(cls, MODEL_FOR_CAUSAL_LM_MAPPING[type(config.teacher_config())]))

    def __init__(self, config: RadladsConfig) -> None:
        object.__setattr__(self, "_student_config", config)
        super().__init__(config.teacher_config())

    def post_init(self) -> None:
        """The family's `__init__` ends with this: attention is replaced before weights are initialised and tied."""
        config = self.__dict__.pop("_student_config")
        convert_backbone(self.model, config)
        config._attn_implementation_internal = self.model.config._attn_implementation_internal
        self.config = config
        self.parts = SimpleNamespace(**config.family)
        self.generation_config = GenerationConfig.from_model_config(config)
        super().post_init()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The family's class is made together with a model, so pickle cannot find it by name.
        own = {name: value for name, value in self.__dict__.items() if name != RECORDINGS}  # of this process and model
        return _rebuild, (self._generic, self._family), own

    def build_mixer(self, layer: int, shape: AttentionShape) -> Mixer:
        """A fresh mixer for a layer, on torch's default device and in its default dtype."""
        return build_mixer(self.config, layer, shape)

    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self.model, self.parts.layers)
        return layers

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = remember_buffers(self)
        super()._apply(fn, recurse)
        restore_buffers(kept)
        return self

    def new_cache(self, path: str | None = None, *, room: int = 0) -> RadladsCache:
        """An empty cache, or what `cache.save(path)` wrote, on this model's device. room: tokens for which kept layers
        take memory at once. Raises ValueError for a file of another model."""
        return RadladsCache(self.config, room) if path is None else RadladsCache.load(path, self.config, self.device)

    def forget_recordings(self) -> None:
        """Free the memory of recorded decoding steps, which generate() keeps for its next call."""
        forget_recordings(self)

    def mixers(self) -> dict[int, Mixer]:
        """Layer → its mixer, for the converted layers."""
        modules = {i: getattr(layer, self.parts.attention, None) for i, layer in enumerate(self._layers())}
        return {i: module for i, module in modules.items() if isinstance(module, Mixer)}

    def attention(self, layer: int) -> nn.Module:
        """A layer's attention, or the mixer in its place."""
        module: nn.Module = getattr(self._layers()[layer], self.parts.attention)
        return module

    def parameter_group(self, name: str) -> str:
        """mixer, attention, mlp, norms, embeddings or head, for a name of `named_parameters()`."""
        return parameter_group(name, self.parts, set(self.mixers()))

    def hidden(self, input_ids: Tensor, **given: Any) -> Tensor:
        """The last hidden state [B,T,D], after the final norm, without a cache.

        given: `cu_seqlens`, int [N+1], document bounds in the flattened [B·T], row bounds included: state, attention
        and positions restart there; or `row_part`; and `rope_factor` (forward_pass.py).
        """
        hidden: Tensor = self.model(input_ids=input_ids, **given, use_cache=False).last_hidden_state
        return hidden

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Use a RadladsCache: the cache that generate() would make has no length without attention layers. Kept layers
        take memory for the longest text at once, as a static cache would."""
        name, kind = cache_keyword(self.model), generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation='{kind}' does not fit a recurrent state; dynamic and static do")
        if model_kwargs.get(name) is None and generation_config.use_cache is not False:
            model_kwargs[name] = RadladsCache(self.config, room=args[-1] if args else kwargs["max_cache_length"])
            model_kwargs[name].for_one_call = True
            if generation_config.is_assistant:
                model_kwargs[name].activate_past_recording()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Read a long prompt in pieces, so that what a pass keeps does not grow with it."""
        cache = model_kwargs.get(cache_keyword(self.model))
        if generation_config.prefill_chunk_size is None and isinstance(cache, RadladsCache):
            piece = prompt_piece(self.config, *input_ids.shape)
            if piece < input_ids.shape[1] - cache.get_seq_length() and model_kwargs.get("inputs_embeds") is None:
                generation_config = copy.copy(generation_config)
                generation_config.prefill_chunk_size = piece
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with steps that are recorded once as a CUDA graph where that can be done."""
        made = sample_recorded(self, input_ids, *args, **kwargs)
        return super()._sample(input_ids, *args, **kwargs) if made is None else made


class _WithBackbone(PreTrainedModel):
    """A head, or none, on the family's backbone; weights are named as in RadladsForCausalLM."""

    config_class = RadladsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)

    def _add_backbone(self, config: RadladsConfig) -> None:
        inner = config.teacher_config()
        self.model = MODEL_MAPPING[type(inner)](inner)
        convert_backbone(self.model, config)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = remember_buffers(self)
        super()._apply(fn, recurse)
        restore_buffers(kept)
        return self


class RadladsModel(_WithBackbone):
    """Without a head: hidden states."""

    def __init__(self, config: RadladsConfig) -> None:
        super().__init__(config)
        self._add_backbone(config)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The family's backbone's."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class RadladsForSequenceClassification(GenericForSequenceClassification, _WithBackbone):
    """A linear head on the last token that is not padding."""

    def __init__(self, config: RadladsConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self._add_backbone(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


def norm_names(parts: Any) -> tuple[str, ...]:
    """The norms of a layer that a family names."""
    named = (parts.input_norm, parts.mlp_norm, *getattr(parts, "other_norms", ()))
    return tuple(name for name in named if name is not None)


def logit_factor(config: Any, parts: Any) -> float:
    """The factor on a family's head output; `parts`: a family, or its names. Softcaps are refused."""
    times, over = getattr(parts, "logit_scale", None), getattr(parts, "logit_divisor", None)
    return (getattr(config, times) if times else 1.0) / (getattr(config, over) if over else 1.0)


def parameter_group(name: str, parts: Any, mixer_layers: set[int]) -> str:
    """The group of a parameter of a student (no mixer layers: of a teacher). Raises KeyError for an unknown one."""
    words = name.split(".")
    if words[0] == "lm_head":
        return "head"
    if parts.embeddings in words:
        return "embeddings"
    if parts.layers in words:
        place = words.index(parts.layers)
        part = words[place + 2]
        if part == parts.attention:
            return "mixer" if int(words[place + 1]) in mixer_layers else "attention"
        if part == getattr(parts, "linear_attention", None):
            return "attention"
        if part == parts.mlp:
            return "mlp"
        if part in norm_names(parts):
            return "norms"
    elif parts.final_norm in words:
        return "norms"
    raise KeyError(f"parameter '{name}' belongs to no known group")


__all__ = ["RadladsCache", "RadladsForCausalLM", "RadladsForSequenceClassification", "RadladsModel", "RecurrentLayer"]
