"""Keys and values of layers that stay softmax attention, during generation: tensors with room for the tokens to come.

Dims: B rows, H key heads, T tokens, L room, K dim per head. Needs torch and transformers only: an exported model
carries this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_GROWTH = 1.25


class KeptLayer(DynamicLayer):
    """As DynamicLayer, but tokens are written into room that was kept for them: nothing before them is copied.

    With gradients, and under torch.compile, it is DynamicLayer itself.
    """

    def __init__(self, room: int = 0) -> None:
        """room: tokens that it must hold, if known; else it grows by a quarter whenever it is full."""
        super().__init__()
        self.room = room
        self._held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if learns or torch.compiler.is_compiling():
            self._held = None
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        held = self._held
        if held is None or held[0].shape[-2] < after or not self._in_place(before):
            room = max(self.room, int(after * _GROWTH) if before else after)
            held = _with_room(key_states, self.keys, room), _with_room(value_states, self.values, room)
            self._held = held
        for buffer, new in zip(held, (key_states, value_states), strict=True):
            buffer[..., before:after, :] = new
        self.keys, self.values = (buffer[..., :after, :] for buffer in held)
        return self.keys, self.values

    def _in_place(self, length: int) -> bool:
        """Whether keys and values are the first tokens of what is held, and not tensors that somebody else made, and
        can be written: not those of torch.inference_mode outside it."""
        if self._held and self._held[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        held = zip(self._held or (), (self.keys, self.values), strict=False)
        return not length or all(x.data_ptr() == buffer.data_ptr() and len(x) == len(buffer) for buffer, x in held)

    def reset(self) -> None:
        self.keys = self.values = self._held = None
        self.is_initialized = False


class FixedLayer(CacheLayerMixin):
    """Keys and values in tensors of the final length [B,H,L,K], for steps that are recorded: a mask tells which tokens
    exist. place: [1], of the next token, which all layers share."""

    is_compileable = False
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, length: int, place: Tensor) -> None:
        """keys, values: [B,H,T,K], copied into the first T places."""
        super().__init__()
        self.keys, self.values = (_with_room(x, x, length, zero=True) for x in (keys, values))
        self.place, self.length, self.is_initialized = place, length, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self) -> int:
        return self.length


def _with_room(new: Tensor, old: Tensor | None, length: int, *, zero: bool = False) -> Tensor:
    """A tensor like `new` of so many tokens, that begins with `old`. zero: what follows is zeros."""
    *rows, _, channels = new.shape
    longer = (new.new_zeros if zero else new.new_empty)(*rows, length, channels)
    if old is not None and old.numel():
        longer[..., : old.shape[-2], :] = old
    return longer
