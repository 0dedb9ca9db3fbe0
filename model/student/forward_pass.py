"""Additions of a converted backbone to its family's forward pass: one context for all mixers, passed by the layers.

The backbone is the family's own transformers model; its attention modules are mixers, or unchanged attention. The
additions are hooks, so that no method of transformers is replaced. Dims: B batch, T time, N documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import TransformersKwargs

from radlads.model.mixers.shared.mixer import FirstValues, MixerContext
from radlads.model.student.cache import RadladsCache, RecurrentLayer
from radlads.model.student.decoding.recorded_steps import DECODING_STEP
from radlads.model.student.documents import check_bounds, document_bounds, document_positions, restart_bounds
from radlads.model.student.kept_attention import CONTEXT, ROW_PART, FadedPositions, log_scale
from radlads.model.student.releases import CACHE_NAMES, cache_keyword

ROPE_FACTOR = "rope_factor"
"""The keyword of a pass in training whose kept layers lose their rotary positions by and by: a scalar tensor
(`FadedPositions`)."""
# Keywords that family models accept besides their named parameters: options of attention and of the loss.
_PASSED_ON = {*TransformersKwargs.__annotations__, *inspect.signature(ForCausalLMLoss).parameters, "return_dict"}
_PASSED_ON |= {"debug_io", "debug_io_dir", "prune_layers"}
_OWN = (ROW_PART, ROPE_FACTOR, DECODING_STEP)
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments of generate() that it hands on to every pass, where they have no meaning."""


class ForwardPass:
    """Forward pre-hook of a converted backbone: completes its arguments.

    Positions that restart where documents do, positions that do not count padding, a cache that fits, and the context
    of the mixers.
    """

    def __init__(self, backbone: nn.Module, config: Any, layers: str) -> None:
        """config: the student's RadladsConfig. layers: the name of the backbone's layers."""
        self.config = config
        self.layers = layers
        self.parameters = tuple(inspect.signature(backbone.forward).parameters)
        self.cache_name = cache_keyword(backbone)

    def __call__(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        for name in _OF_GENERATE:
            given.pop(name, None)
        self._refuse_unknown(given)
        cache, cu_seqlens = self._take_cache(given), given.pop("cu_seqlens", None)
        row_part, rope_factor = given.pop(ROW_PART, None), given.pop(ROPE_FACTOR, None)
        is_step = given.pop(DECODING_STEP, False)
        inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if inputs is None:
            return (), given  # the family's code reports what is missing
        B, T = inputs.shape[:2]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        converted = bool(self.config.converted_layers())
        restarts = len(self.config.softmax_layers()) == self.config.num_hidden_layers
        if row_part is not None:
            if mask is not None or cache is not None or not restarts:
                raise ValueError("ranks share rows in training, without attention_mask, cache and linear attention")
            cu_seqlens, given["position_ids"] = row_part.cu_seqlens, row_part.position_ids
            positions = None  # they say nothing of where documents begin: a part may begin inside one
        bounds = _explicit_bounds(given, cu_seqlens, B, T)
        if bounds is not None:
            if mask is not None or cache is not None or given.get("use_cache"):
                raise ValueError("packed documents are for training: no attention_mask and no cache with their bounds")
            if given.get("position_ids") is None:
                given["position_ids"] = document_positions(bounds, B, T)
        elif (converted or not restarts) and positions is not None and positions.shape[-1] > 1:
            bounds = _packed_rows(positions.expand(B, -1), mask, cache)
        if bounds is not None and not restarts:
            raise ValueError(
                "packed documents: the layers that are linear attention in the teacher already do not restart where "
                "documents do; give every document a row of its own"
            )

        recomputes = backbone.gradient_checkpointing and backbone.training and torch.is_grad_enabled()
        if given.get("use_cache") is None:
            given["use_cache"] = bool(self.config.use_cache) and not backbone.training and bounds is None
        if recomputes:  # as transformers does: a cache would be filled a second time in the backward pass
            given["use_cache"], cache = False, None
            _pass_values_explicitly(getattr(backbone, self.layers))
        if converted:
            if cache is None and given["use_cache"]:
                cache = RadladsCache(self.config)
            self._check_cache(cache)
            if not is_step:
                _check_mask(mask, B, 0 if cache is None else cache.get_seq_length(), T)
            if positions is None and mask is not None:
                # With decay a mixer's output depends on absolute positions, so padding must not count (in attention it
                # does not matter).
                given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        given[self.cache_name] = cache
        for flag in ("output_hidden_states", "output_attentions"):
            if given.get(flag) is None and getattr(self.config, flag, False):
                given[flag] = True
        given[CONTEXT] = MixerContext(
            keep=None if mask is None or is_step or not converted else mask[:, -T:].bool(),
            cu_seqlens=bounds,
            attention_rope=self.config.attention_rope,
            cached=cache is not None,
            row_part=row_part,
            **self._of_kept_layers(backbone, given, inputs, rope_factor),
        )
        pure = converted and restarts and not len(self.config.attention_layers)
        if pure and (mask is not None or cache is not None):
            # No layer reads a mask, which the family would make of all pairs of tokens; one that is given it takes.
            given["attention_mask"] = inputs.new_zeros(1, 1, 1, 1, dtype=torch.bool)
        return (), given

    def _of_kept_layers(
        self, backbone: nn.Module, given: Mapping[str, Any], inputs: Tensor, rope_factor: Tensor | None
    ) -> dict[str, Any]:
        """What the context says of scores and faded positions, from the completed arguments."""
        base = self.config.attention_log_scale
        if base is None and rope_factor is None:
            return {}
        positions = given.get("position_ids")
        if positions is None:
            positions = _positions(inputs, given[self.cache_name], given.get("attention_mask"))
        found: dict[str, Any] = {}
        if base is not None:  # of several kinds of positions (vision-language models), text has all alike
            found["score_scale"] = log_scale(positions if positions.ndim == 2 else positions[0], base)
        if rope_factor is not None:
            rotary, kinds = getattr(backbone, self.config.family["rotary"]), self.config.teacher.get("layer_types")
            found["faded"] = FadedPositions(rotary, kinds, positions, rope_factor)
        return found

    def _refuse_unknown(self, given: Mapping[str, Any]) -> None:
        unknown = given.keys() - {*self.parameters, *_PASSED_ON, *CACHE_NAMES, "cu_seqlens", *_OWN}
        if unknown:
            raise TypeError(f"forward() got an unexpected keyword argument '{min(unknown)}'")

    def _take_cache(self, given: dict[str, Any]) -> Any:
        caches = [given.pop(name, None) for name in CACHE_NAMES]
        return next((cache for cache in caches if cache is not None), None)

    def _check_cache(self, cache: Any) -> None:
        if cache is None:
            return
        converted, layers = self.config.converted_layers(), getattr(cache, "layers", ())
        fits = len(layers) == self.config.num_hidden_layers and all(
            isinstance(layer, RecurrentLayer) == (i in converted) for i, layer in enumerate(layers)
        )
        if not fits:
            raise ValueError(
                f"{self.cache_name} must be a RadladsCache(config): recurrent layers keep a state, not keys and values"
            )


def _positions(inputs: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """Positions [1 or B,T] of the tokens of a pass, padding not counted."""
    T = inputs.shape[1]
    if mask is not None and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    seen = 0 if cache is None else cache.get_seq_length()
    return torch.arange(seen, seen + T, device=inputs.device)[None]


def _explicit_bounds(given: dict[str, Any], cu_seqlens: Tensor | None, B: int, T: int) -> Tensor | None:
    """Bounds by our own name, by flash attention's, or as a document number for every token."""
    if cu_seqlens is not None:
        return check_bounds(cu_seqlens, B, T)
    if given.get("cu_seq_lens_q") is not None:
        return check_bounds(given["cu_seq_lens_q"], B, T)
    return None if given.get("seq_idx") is None else document_bounds(given["seq_idx"].view(B, T))


def _packed_rows(positions_BT: Tensor, mask: Any, cache: Any) -> Tensor | None:
    """Bounds where positions restart; transformers takes rows for packed where there is neither mask nor cache."""
    if mask is None:
        return restart_bounds(positions_BT) if cache is None else None
    if mask.ndim == 2:
        keep = mask[:, -positions_BT.shape[1] :].bool()
        if bool(((positions_BT.diff(dim=-1) != 1) & keep[:, 1:] & keep[:, :-1]).any()):
            raise ValueError("position_ids restart inside a row: packed documents must come without attention_mask")
    return None


def _check_mask(mask: Any, B: int, seen: int, T: int) -> None:
    shape = None if mask is None else tuple(getattr(mask, "shape", ()))
    if shape is not None and shape != (B, seen + T):
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {(B, seen + T)}, seen tokens included, not {shape}: recurrent "
            "layers cannot follow an arbitrary pattern"
        )


def _pass_values_explicitly(layers: nn.ModuleList) -> None:
    for layer in layers:
        function = layer._gradient_checkpointing_func
        if not isinstance(function, LayerCheckpoint):
            layer._gradient_checkpointing_func = LayerCheckpoint(function)


class LayerCheckpoint:
    """A layer's checkpointing function, which makes first values inputs and outputs of the checkpoint.

    Passed through the context alone they would have no gradient in the reentrant form, and a checkpoint kept until the
    backward pass would reference their graph, which references the checkpoint.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, layer: partial[Any], *args: Tensor) -> Tensor:
        """layer: a decoder layer's forward with its keywords. args: its hidden states."""
        call, own, keywords = layer.func, layer.args, dict(layer.keywords)
        context: MixerContext = keywords.pop(CONTEXT)
        apart, before = replace(context, first=None), context.first
        hands_on = before is None

        def run(v: Tensor | None, k: Tensor | None, *args: Tensor) -> Any:
            inner = replace(apart, first=None if hands_on else FirstValues(v, k))
            out = call(*own, *args, **keywords, **{CONTEXT: inner})
            return (out, *(inner.first or FirstValues())) if hands_on else out

        if before is not None:
            return self.function(run, *before, *args)
        out, v, k = self.function(run, None, None, *args)
        if v is not None or k is not None:  # else no recurrent layer yet, or a variant without first values
            context.first = FirstValues(v, k)
        return out
