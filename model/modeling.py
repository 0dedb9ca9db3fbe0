"""The converted model: the teacher family's own transformers modules, with attention replaced by mixers in most layers.

Dims: B batch, T time, D model width, L layers, N packed documents.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_MAPPING, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from radlads.model.cache import RadladsCache, RecurrentLayer
from radlads.model.configuration import RadladsConfig
from radlads.model.mixer import AttentionShape, FirstValues, Mixer, read_attention_shape
from radlads.model.precision import remember_buffers, restore_buffers
from radlads.model.variants import mixer_class


class _Context(NamedTuple):
    """What every layer of one pass shares."""

    rope: tuple[Tensor, Tensor]
    attention_rope: tuple[Tensor, Tensor]
    position_ids: Tensor
    attention_masks: dict[bool, Any]
    keep: Tensor | None
    cu_seqlens: Tensor | None
    cache: RadladsCache | None


class RadladsForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model. With no layer converted (and `attention_rope`) its logits are the teacher's bits."""

    config_class = RadladsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # no assisted generation: a recurrent state cannot be cropped
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RadladsConfig) -> None:
        super().__init__(config)
        inner_config = config.teacher_config()
        self.model = MODEL_MAPPING[type(inner_config)](inner_config)
        self.parts = SimpleNamespace(**config.family)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self._replace_attention(config)
        self.post_init()

    def _replace_attention(self, config: RadladsConfig) -> None:
        layers = self._layers()
        kind = mixer_class(config.variant)
        if dict(config.constants) != kind.CONSTANTS:
            raise ValueError(
                f"this model was made with the {config.variant} constants {config.constants}, "
                f"but this code has {kind.CONSTANTS}"
            )
        self._windowed = config.windowed_layers()
        self._recurrent = [i for i in range(len(layers)) if i not in set(config.attention_layers)]
        for i in self._recurrent:
            attention = getattr(layers[i], self.parts.attention)
            shape = read_attention_shape(attention, self.parts, getattr(self.model.config, "rms_norm_eps", 1e-6))
            setattr(layers[i], self.parts.attention, self.build_mixer(i, shape))

    def build_mixer(self, layer: int, shape: AttentionShape) -> Mixer:
        """A fresh mixer for a layer, on torch's default device and in its default dtype."""
        return mixer_class(self.config.variant)(
            shape,
            SimpleNamespace(**self.config.options),
            layer=layer,
            num_layers=len(self._layers()),
            first=layer == self._recurrent[0],
        )

    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self.model, self.parts.layers)
        return layers

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = remember_buffers(self)
        super()._apply(fn, recurse)
        restore_buffers(kept)
        return self

    def mixers(self) -> dict[int, Mixer]:
        """Layer → its mixer, for the converted layers."""
        modules = {i: getattr(layer, self.parts.attention) for i, layer in enumerate(self._layers())}
        return {i: module for i, module in modules.items() if isinstance(module, Mixer)}

    def parameter_group(self, name: str) -> str:
        """mixer, attention, mlp, norms, embeddings or head, for a name of `named_parameters()`."""
        return parameter_group(name, self.parts, set(self.mixers()))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each layer in the backward pass, non-reentrant (the reentrant form gave the authors a bad loss)."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = False

    def hidden(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RadladsCache | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """The last hidden state [B,T,D], after the final norm.

        attention_mask: [B, seen + T], 0 at padding (anywhere; left for generation). cu_seqlens: int [N+1], document
        bounds in the flattened [B·T], row bounds included: state, attention and positions restart there. collect:
        receives every layer's input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        x = getattr(self.model, self.parts.embeddings)(input_ids) if inputs_embeds is None else inputs_embeds
        context = self._context(x, attention_mask, position_ids, past_key_values, cu_seqlens)
        first: FirstValues | None = None
        for i, layer in enumerate(self._layers()):
            if collect is not None:
                collect.append(x)
            if self.gradient_checkpointing and self.training:
                x, first = checkpoint(self._layer, i, layer, x, first, context, use_reentrant=False)
            else:
                x, first = self._layer(i, layer, x, first, context)
        if past_key_values is not None:
            past_key_values.num_seen += x.shape[1]
        x = getattr(self.model, self.parts.final_norm)(x)
        if collect is not None:
            collect.append(x)
        return x

    def _layer(
        self, index: int, layer: nn.Module, x: Tensor, first: FirstValues | None, context: _Context
    ) -> tuple[Tensor, FirstValues | None]:
        """Norm, mixer or attention, residual, norm, MLP, residual."""
        mixer = getattr(layer, self.parts.attention)
        normed = getattr(layer, self.parts.input_norm)(x)
        if isinstance(mixer, Mixer):
            memory = None if context.cache is None else context.cache.layers[index]
            mixed, first, state = mixer(
                normed,
                rope=context.rope,
                first=first,
                state=None if memory is None else memory.state,
                keep_BT=context.keep,
                cu_seqlens=context.cu_seqlens,
                output_state=memory is not None,
            )
            if memory is not None:
                memory.state = state
        else:
            mixed, _ = mixer(
                hidden_states=normed,
                position_embeddings=context.attention_rope,
                attention_mask=context.attention_masks[index in self._windowed],
                past_key_values=context.cache,
                position_ids=context.position_ids,
            )
        x = x + mixed
        return x + getattr(layer, self.parts.mlp)(getattr(layer, self.parts.mlp_norm)(x)), first

    def _context(
        self,
        x: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: RadladsCache | None,
        cu_seqlens: Tensor | None,
    ) -> _Context:
        B, T, _ = x.shape
        if cu_seqlens is not None:
            if attention_mask is not None or cache is not None:
                raise ValueError(
                    "cu_seqlens is for training on packed documents: no attention_mask and no cache with it"
                )
            position_ids = document_positions(cu_seqlens, B, T)
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (B, seen + T):
            raise ValueError(
                f"attention_mask must be [batch, tokens] = {(B, seen + T)}, seen tokens included, not "
                f"{tuple(attention_mask.shape)}: recurrent layers cannot follow an arbitrary pattern"
            )
        if position_ids is None and attention_mask is not None and self._recurrent:
            # Decay makes a mixer feel absolute positions, so padding must not count (attention alone would not care).
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is None:
            position_ids = (torch.arange(T, device=x.device) + seen).unsqueeze(0)
        rope = getattr(self.model, self.parts.rotary)(x, position_ids)
        masks = {}
        for layer in self.config.attention_layers:
            if (layer in self._windowed) not in masks:
                build = create_sliding_window_causal_mask if layer in self._windowed else create_causal_mask
                masks[layer in self._windowed] = build(
                    config=self.model.config,
                    inputs_embeds=x,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    position_ids=position_ids,
                    layer_idx=layer,
                )
        kept_rope = rope if self.config.attention_rope else (torch.ones_like(rope[0]), torch.zeros_like(rope[1]))
        keep = None if attention_mask is None else attention_mask[:, -T:].bool()
        return _Context(rope, kept_rope, position_ids, masks, keep, cu_seqlens, cache)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RadladsCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Hugging Face conventions: `labels` are unshifted, `logits_to_keep` counts from the end. Rest: `hidden`."""
        use_cache = (
            (self.config.use_cache and not self.training and cu_seqlens is None) if use_cache is None else use_cache
        )
        if past_key_values is None and use_cache:
            past_key_values = RadladsCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, RadladsCache):
            raise ValueError(
                "past_key_values must be a RadladsCache(config): recurrent layers keep a state, not keys and values"
            )
        collect: list[Tensor] | None = [] if output_hidden_states else None
        x = self.hidden(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            cu_seqlens=cu_seqlens,
            collect=collect,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(x[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=None if collect is None else tuple(collect),
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """generate() makes its own cache otherwise, which cannot tell its length without attention layers."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation='{generation_config.cache_implementation}' does not fit a recurrent state"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RadladsCache(self.config)


def document_positions(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Positions [B,T] that restart at every bound of cu_seqlens [N+1] over the flattened [B·T]."""
    place = torch.arange(B * T, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous().long(), place, right=True)
    return (place - cu_seqlens.long()[document]).view(B, T)


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
        if part == parts.mlp:
            return "mlp"
        if part in (parts.input_norm, parts.mlp_norm):
            return "norms"
    elif parts.final_norm in words:
        return "norms"
    raise KeyError(f"parameter '{name}' belongs to no known group")


__all__ = ["RadladsCache", "RadladsForCausalLM", "RecurrentLayer"]
