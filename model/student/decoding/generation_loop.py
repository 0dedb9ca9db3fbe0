"""generate() of a student on a GPU: long prompts are read in pieces, and steps are recorded once as a CUDA graph.

Dims: B rows, T prompt tokens, V words. An exported model carries this file.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from radlads.model.student.decoding.kept_layer import KeptLayer
from radlads.model.student.decoding.recorded_steps import RecordedSteps
from radlads.model.student.decoding.token_choice import Chooser, can_be_recorded, choose, what_chooses
from radlads.model.student.releases import CACHE_NAMES

_FEWEST = 12
"""New tokens from which recording pays: it takes as long as a few steps."""
_CHECK = 8
"""Steps between two questions whether all rows have ended, for which the host waits."""
_ROOM = 1024  # kept layers' tensors are a multiple of it long, so that calls share a recording
_SAVED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_OWN_HOOKS = ("forward_pass", "kept_attention", "first_values")
_PIECE, _FEWEST_READ = 2**24, 2**15
_NARROW = 1024
_OF_TORCH = frozenset(vars(torch.nn.Module()))
RECORDINGS = "_recorded_steps"
"""The attribute of a model that has its recordings."""
_MOST_MASKED = 2**28


def prompt_piece(config: Any, rows: int, tokens: int) -> int:
    """Tokens of a prompt that a pass reads at once, of every row: enough to fill a GPU, and no more memory than 32 MB
    of a 16-bit tensor of the model's width (64 of a narrow one, which waits for launches), or 256 MB for the mask of
    kept layers."""
    most = max(_PIECE // config.hidden_size, _FEWEST_READ if config.hidden_size <= _NARROW else 0)
    if len(config.attention_layers):
        most = min(most, _MOST_MASKED // max(1, tokens))
    return max(256, most // max(1, rows) // 64 * 64)


def sample_recorded(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """As GenerationMixin._sample; None where the steps of this call are not to be recorded."""
    name = next((name for name in CACHE_NAMES if model_kwargs.get(name) is not None), CACHE_NAMES[0])
    cache = model_kwargs.get(name)
    new_tokens = (stopping_criteria.max_length or 0) - input_ids.shape[1]
    if synced_gpus or new_tokens < _FEWEST or not _can_record(model, cache, generation_config, model_kwargs):
        return None
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    loop = _Loop(model, cache, generation_config, logits_processor, stopping_criteria, streamer)
    ids = loop.run(input_ids, outputs.logits[:, -1], model_kwargs)
    if not generation_config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids, **{name: cache})


def forget_recordings(model: Any) -> None:
    """Free the memory of the recorded steps of a model."""
    model.__dict__.pop(RECORDINGS, None)


def _can_record(model: Any, cache: Any, config: Any, given: dict[str, Any]) -> bool:
    if cache is None or config.disable_compile or config.is_assistant or any(getattr(config, one) for one in _SAVED):
        return False
    if model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    positions, device = given.get("position_ids"), next(model.parameters()).device
    if (positions is not None and positions.ndim != 2) or torch.is_autocast_enabled(device.type):
        return False
    if not all(mixer.RECURRENT for mixer in model.mixers().values()):
        return False  # a state that grows
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return False
    kept = [layer for layer in cache.layers if not hasattr(layer, "remember")]
    if any(type(layer) is not KeptLayer for layer in kept):
        return False
    if kept and model.config._attn_implementation != "sdpa":
        return False
    return _on_one_gpu(model) and not _is_watched(model)


def _is_watched(model: Any) -> bool:
    """Whether somebody hooked a module: a replay calls no Python."""
    return any(
        module._forward_hooks or any(_is_foreign(hook) for hook in module._forward_pre_hooks.values())
        for module in model.modules()
    )


def _is_foreign(hook: Any) -> bool:
    place = getattr(hook, "__module__", None) or type(hook).__module__
    return place.rpartition(".")[2].removesuffix("_radlads") not in _OWN_HOOKS


def _on_one_gpu(model: Any) -> bool:
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


class _Loop:
    """The loop of one call of generate()."""

    def __init__(self, model: Any, cache: Any, config: Any, processors: Any, stopping: Any, streamer: Any) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.processors, self.stopping, self.streamer = processors, stopping, streamer
        self.eos = [one for one in stopping if hasattr(one, "eos_token_id")]
        known = {"MaxLengthCriteria", "EosTokenCriteria"}
        self.asks = any(type(one).__name__ not in known for one in stopping)
        self.in_step = can_be_recorded(processors)
        # A cache that outlives the call must not read tokens after the last one.
        self.exact = config.return_dict_in_generate or not cache.for_one_call

    def run(self, ids: Tensor, logits_BV: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """The text [B, up to the longest] of prompts, whose last logits are given."""
        device, count = ids.device, self.stopping.max_length - ids.shape[1]
        unfinished = torch.ones(len(ids), dtype=torch.bool, device=device)
        token_B, prompt = self._choose(logits_BV, ids, unfinished), ids.shape[1]
        steps, key, number = None, None, 1
        ids = self._add(ids, token_B)
        unfinished = unfinished & ~self.stopping(ids, None)
        while number < count and not (self._looks(number) and not bool(unfinished.any())):
            if steps is None:
                steps, key = self._steps(len(ids), count)
                positions = next_positions(model_kwargs, self.cache)
                mask_BT = model_kwargs.get("attention_mask")
                steps.begin(self.cache, token_B, positions, unfinished, mask_BT, keep=self.exact)
            logits_BV = steps.advance()
            if self.in_step:
                token_B, unfinished = steps.token_B1[:, 0].clone(), steps.unfinished_B.clone()
                ids = self._add(ids, token_B)
            else:
                token_B = self._choose(logits_BV, ids, unfinished)
                ids = self._add(ids, token_B)
                unfinished = unfinished & ~self.stopping(ids, None)
                steps.token_B1.copy_(token_B[:, None])
            if self.in_step and self.asks:
                unfinished = unfinished & ~self.stopping(ids, None)
                steps.unfinished_B.copy_(unfinished)
            number += 1
        if steps is not None:
            if self.exact:
                steps.end(self.cache)
            made = _recordings(self.model)
            made.clear()
            made[key] = steps
        if self.streamer is not None:
            self.streamer.end()
        return self._cut(ids, prompt)

    def _looks(self, number: int) -> bool:
        """Whether to ask now if all rows have ended."""
        return bool(self.exact or self.asks or self.streamer is not None or number % _CHECK == 0)

    def _choose(self, logits_BV: Tensor, ids: Tensor, unfinished: Tensor) -> Tensor:
        token_B = choose(logits_BV, self.processors, ids, do_sample=self.config.do_sample)
        return torch.where(unfinished, token_B, self.config._pad_token_tensor) if self.eos else token_B

    def _add(self, ids: Tensor, token_B: Tensor) -> Tensor:
        if self.streamer is not None:
            self.streamer.put(token_B.cpu())
        return torch.cat([ids, token_B[:, None]], dim=-1)

    def _cut(self, ids: Tensor, prompt: int) -> Tensor:
        """Without the padding that was added after the last row had ended."""
        if not self.eos or self.exact or self.asks:
            return ids
        ended = torch.isin(ids[:, prompt:], self.eos[0].eos_token_id.to(ids.device)).int()
        first = torch.where(ended.any(-1), ended.argmax(-1) + 1, ended.shape[1])
        return ids[:, : prompt + int(first.max())]

    def _steps(self, rows: int, count: int) -> tuple[RecordedSteps, Hashable]:
        """The recording of an earlier call that does the same, or a new one, and its key. Until the call ends it is
        this call's alone: another one, of another thread or from inside a streamer, makes its own."""
        model, kept = self.model, [layer for layer in self.cache.layers if not hasattr(layer, "remember")]
        # Not stopping.max_length: it counts neither embeddings nor what a given cache had read.
        room = -(-(self.cache.get_seq_length() + count) // _ROOM) * _ROOM if kept else 0
        chooses = what_chooses(self.processors, do_sample=self.config.do_sample) if self.in_step else None
        ends = tuple(self.eos[0].eos_token_id.tolist()) if self.eos else ()
        pad = self.config._pad_token_tensor
        ends += () if pad is None else ("pad", *pad.flatten().tolist())
        # Tensors that inference mode made cannot be written outside it.
        key = (rows, room, chooses, ends, what_runs(model), torch.is_inference_mode_enabled())
        made = _recordings(model)
        steps = made.pop(key, None)
        if steps is None:
            made.clear()  # no two at once: each holds states, and keys and values
            eos = self.eos[0].eos_token_id if self.eos else None
            chooser = Chooser(self.processors, self.config, eos) if self.in_step else None
            steps = RecordedSteps(model, rows, room, chooser)
        return steps, key


def _recordings(model: Any) -> dict[Hashable, RecordedSteps]:
    made: dict[Hashable, RecordedSteps] = model.__dict__.setdefault(RECORDINGS, {})
    return made


def what_runs(model: Any) -> Hashable:
    """Changes with all that a recording holds of a model: where its weights are, and the settings of its modules, such
    as the active adapter."""
    weights = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    told = [(type(one), _settings(one)) for one in model.modules()]
    return hash((weights, tuple(told), model.config._attn_implementation))


def _settings(module: torch.nn.Module) -> Hashable:
    """What is plain in a module's own attributes; of a function that replaces its forward, which one it is."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    return (
        id(own.get("forward")),
        *((name, repr(value)) for name, value in own.items() if _is_plain(value)),
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def next_positions(model_kwargs: dict[str, Any], cache: Any) -> Tensor:
    """The positions [B or 1,1] of the next tokens, from what generate() carries along: padding does not count."""
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is not None:
        return positions[..., -1:]
    if mask is not None:
        return mask.long().sum(-1, keepdim=True) - 1
    return torch.tensor([[cache.get_seq_length()]])
