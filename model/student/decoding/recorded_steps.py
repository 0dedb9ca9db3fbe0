"""Decoding steps that are recorded once as a CUDA graph and replayed: a step is one launch instead of thousands.

A step reads one token of every row. All that it reads and writes keeps its address: the states of recurrent layers have
one size, and keys and values of kept layers lie in tensors as long as the text may become, with a mask that follows. A
recording is used again by later calls with as many rows.

Dims: B rows, T tokens read before, L room of kept layers, V words. An exported model carries this file.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from radlads.model.mixers.shared.mixer import MixerState
from radlads.model.student.decoding.kept_layer import FixedLayer
from radlads.model.student.decoding.recorder import NUM_EAGER, CudaRecorder, NotRecordedError, WaitsForGpuError
from radlads.model.student.decoding.token_choice import Chooser
from radlads.model.student.releases import cache_keyword

DECODING_STEP = "decoding_step"
"""The keyword of a pass over one token of every row, none of them padding, whose attention_mask is what kept layers
see, [B,1,1,L], or None."""
_log = logging.getLogger("radlads")


class RecordedSteps:
    """A step of so many rows: run as it is at first, then recorded, then replayed."""

    def __init__(self, model: Any, rows: int, room: int, chooser: Chooser | None) -> None:
        """room: tokens that kept layers hold; 0: there are none. chooser: chooses the next tokens in the step; None:
        the caller does, and writes them into `token_B1`."""
        device = next(model.parameters()).device
        self._model = weakref.ref(model)  # which holds this: its memory is to be free as soon as it is dropped
        self.chooser, self.room, self.cache_name = chooser, room, cache_keyword(model.model)
        self.token_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position_B1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.unfinished_B = torch.ones(rows, dtype=torch.bool, device=device)
        self.mask = torch.zeros(rows, 1, 1, room, dtype=torch.bool, device=device) if room else None
        self.logits_BV: Tensor | None = None
        self.states: dict[int, MixerState] = {}
        self.layers: list[Any] = []
        self.taken = 0
        self._recorder, self._rehearsed = CudaRecorder(device), 0
        self._replay: Callable[[], None] | None = None
        self._eager = False

    def begin(
        self,
        cache: Any,
        token_B: Tensor,
        position_B1: Tensor,
        unfinished_B: Tensor,
        mask_BT: Tensor | None,
        *,
        keep: bool = True,
    ) -> None:
        """Continue from a cache, whose states are copied. mask_BT: an attention_mask of what it has read. keep: whether
        the cache is needed later; else its layers are emptied, one after the other."""
        seen, self.taken, new = cache.get_seq_length(), 0, not self.layers
        for i, layer in enumerate(cache.layers):
            if new:
                self.layers.append(self._make_layer(i, layer))
            elif i in self.states:
                _copy_state(self.states[i], layer.state)
            else:
                fixed = self.layers[i]
                fixed.keys[:, :, :seen], fixed.values[:, :, :seen] = layer.keys, layer.values
            if not keep:
                layer.reset()
        if new:
            self._cache = Cache(layers=self.layers)
        self.token_B1.copy_(token_B[:, None])
        self.position_B1.copy_(position_B1)
        self.place.fill_(seen)
        self.unfinished_B.copy_(unfinished_B)
        if self.mask is not None:
            self.mask.zero_()
            self.mask[:, 0, 0, :seen] = True if mask_BT is None else mask_BT[:, :seen].bool()

    def advance(self) -> Tensor:
        """Read the tokens; the logits [B,V] of the next ones, which a chooser has chosen already."""
        self.taken += 1
        if self._replay is not None:
            self._replay()
        elif self._eager:
            self._step()
        else:
            self._prepare()
        assert self.logits_BV is not None
        return self.logits_BV

    def end(self, cache: Any) -> None:
        """Write what was read since `begin` into the cache from which it began."""
        for i, layer in enumerate(cache.layers):
            if i in self.states:
                layer.remember(MixerState(*(None if x is None else x.clone() for x in self.states[i])), self.taken)
            else:
                before = layer.get_seq_length()
                new = slice(before, before + self.taken)
                layer.update(self.layers[i].keys[:, :, new], self.layers[i].values[:, :, new])

    def _make_layer(self, index: int, layer: Any) -> Any:
        if not hasattr(layer, "remember"):
            return FixedLayer(layer.keys, layer.values, self.room, self.place)
        self.states[index] = MixerState(*(None if x is None else x.clone() for x in layer.state))
        return type(layer)()

    def _prepare(self) -> None:
        """One of the first steps, or the recording."""
        before = [x.clone() for x in self._held()]
        try:
            if self._rehearsed < NUM_EAGER:
                self._rehearsed += 1
                self._recorder.rehearse(self._step, strict=self._rehearsed == NUM_EAGER)
            else:
                _, self._replay = self._recorder.record(self._step)
                self._replay()
        except (WaitsForGpuError, NotRecordedError) as error:
            _log.warning("steps of generation are not recorded as a CUDA graph: %s", error)
            self._eager = True
            for held, old in zip(self._held(), before, strict=True):
                held.copy_(old)
            self._step()

    def _held(self) -> list[Tensor]:
        states = [x for state in self.states.values() for x in state if x is not None]
        return [*states, self.token_B1, self.position_B1, self.place, self.unfinished_B]

    def _step(self) -> None:
        if self.mask is not None:
            self.mask.index_fill_(3, self.place, True)
        for i, state in self.states.items():
            self.layers[i].state = state
        model = self._model()
        assert model is not None
        logits_BV = model(
            input_ids=self.token_B1, attention_mask=self.mask, position_ids=self.position_B1, use_cache=True,
            **{self.cache_name: self._cache, DECODING_STEP: True},
        ).logits[:, -1]  # fmt: skip
        for i, state in self.states.items():
            _copy_state(state, self.layers[i].state)
        if self.logits_BV is None:
            self.logits_BV = torch.empty_like(logits_BV)
        self.logits_BV.copy_(logits_BV)
        if self.chooser is not None:
            self.token_B1.copy_(self.chooser(logits_BV, self.unfinished_B)[:, None])
        for counter in (self.place, self.position_B1):
            counter.add_(1)


def _copy_state(held: MixerState, new: MixerState) -> None:
    for old, x in zip(held, new, strict=True):
        if old is not None and x is not old:
            old.copy_(x)
