"""Greedy generation whose steps are recorded once as a CUDA graph and then replayed.

A step of a small model is thousands of launches for a millisecond of work. Here all that a step reads and writes keeps
its address: keys and values lie in tensors as long as prompt and answer, with a mask that follows; the state of
recurrent layers has one size anyway. The first steps run as they are, as in training (train/engines/pass_graphs.py).

Dims: B rows, T prompt tokens, N new tokens, L = T + N.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from radlads.model.student.cache import RadladsCache, RecurrentLayer
from radlads.model.student.decoding.kept_layer import FixedLayer
from radlads.model.student.decoding.recorder import NUM_EAGER, Recorder, WaitsForGpuError
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.jobs.train.engines.build import SMALL
from radlads.tasks.jobs.train.engines.pass_graphs import Values

logger = logging.getLogger("radlads")

MakeRecorder = Callable[[], Recorder]
_FEWEST = 12
"""New tokens from which recording pays: it takes as long as a few steps."""
_CHECK = 8  # steps between two questions whether all rows have ended, for which the host waits


def records_steps(resources: JobResources, parameters: int) -> bool:
    """Whether generation records its steps, where the networks allow it. parameters: of the student."""
    wanted = resources.cuda_graphs == "on" or (resources.cuda_graphs == "auto" and parameters <= SMALL)
    return wanted and resources.device == "cuda" and not (resources.zero_stage == 3 and resources.processes > 1)


def can_record(model: PreTrainedModel) -> bool:
    """Whether every layer of a model has a memory that keeps its address: full attention, or all are recurrent."""
    if isinstance(model, RadladsForCausalLM):
        return all(isinstance(layer, RecurrentLayer) for layer in RadladsCache(model.config).layers)
    attends = model.config._attn_implementation == "sdpa"  # which takes a mask of booleans
    return attends and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


@torch.no_grad()
def continue_recorded(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    new_tokens: int,
    eos: int | None,
    make_recorder: MakeRecorder,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor | None:
    """Greedy continuations [B, up to N] of prompts padded on the left; what follows an EOS is no text. None: this
    generation cannot be recorded, which is logged where the model lets one expect otherwise. on_token: gets each
    token [B] on the host."""
    if new_tokens < _FEWEST or not can_record(model):
        return None
    steps = _Steps(model, ids_BT.to(model.device), mask_BT.to(model.device), new_tokens, eos)
    recorder, replay = make_recorder(), None
    if on_token is not None:
        on_token(steps.token_B1[:, 0].cpu())
    try:
        for number in range(new_tokens - 1):
            if replay is None and number < NUM_EAGER:
                recorder.rehearse(steps, strict=number == NUM_EAGER - 1)
            else:
                if replay is None:
                    _, replay = recorder.record(steps)
                replay()
            if on_token is not None:
                on_token(steps.token_B1[:, 0].cpu())
            if number % _CHECK == _CHECK - 1 and bool(steps.ended_B.all()):
                return steps.found_BN[:, : number + 2]
    except WaitsForGpuError as error:
        logger.warning("steps of generation are not recorded as a CUDA graph: they wait for the GPU (%s)", error)
        return None
    return steps.found_BN


class _Steps:
    """A batch of prompts, read; each call continues all rows by a token."""

    def __init__(
        self, model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, new_tokens: int, eos: int | None
    ) -> None:
        B, T = ids_BT.shape
        self.model, self.eos = model, -1 if eos is None else eos
        positions_BT = (mask_BT.long().cumsum(-1) - 1).clamp(min=0)
        recurrent = isinstance(model, RadladsForCausalLM)
        cache: Any = RadladsCache(model.config) if recurrent else DynamicCache(config=model.config)
        first = model(
            ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        self.token_B1 = first.float().argmax(-1, keepdim=True)
        self.position_B1 = positions_BT[:, -1:] + 1
        self.place = torch.full((1,), T, device=ids_BT.device)
        self.number = torch.ones(1, dtype=torch.int64, device=ids_BT.device)
        self.found_BN = torch.zeros(B, new_tokens, dtype=torch.int64, device=ids_BT.device)
        self.found_BN[:, :1] = self.token_B1
        self.ended_B = self.token_B1[:, 0] == self.eos
        self.mask: Tensor | None = None
        if recurrent:
            self.cache, self.states = cache, [layer.state for layer in cache.layers]
        else:
            self.states = []
            self.mask = torch.zeros(B, 1, 1, T + new_tokens, dtype=torch.bool, device=ids_BT.device)
            self.mask[:, 0, 0, :T] = mask_BT.bool()
            layers: list[Any] = cache.layers
            for index, layer in enumerate(layers):  # one after the other, so that no more than one is held twice
                layers[index] = FixedLayer(layer.keys, layer.values, T + new_tokens, self.place)
                layer.keys = layer.values = None
            self.cache = Cache(layers=layers)

    def __call__(self) -> Values:
        if self.mask is not None:
            self.mask.index_fill_(3, self.place, True)
        for layer, state in zip(self.cache.layers, self.states, strict=False):
            layer.state = state
        logits_BV = self.model(
            self.token_B1, attention_mask=self.mask, position_ids=self.position_B1, past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]  # fmt: skip
        for layer, state in zip(self.cache.layers, self.states, strict=False):
            for held, new in zip(state, layer.state, strict=True):
                if new is not None and new is not held:
                    if new.shape != held.shape:
                        raise WaitsForGpuError("a layer's state grows")
                    held.copy_(new)
        self.token_B1.copy_(logits_BV.float().argmax(-1, keepdim=True))
        self.ended_B.logical_or_(self.token_B1[:, 0] == self.eos)
        self.found_BN.index_copy_(1, self.number, self.token_B1)
        for counter in (self.number, self.place, self.position_B1):
            counter.add_(1)
        return {}
