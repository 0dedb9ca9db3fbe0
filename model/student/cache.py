"""Cache of a converted model: an fp32 state per recurrent layer, keys and values only where attention was kept.

Layers that are linear attention in the teacher already have the memory that their own code keeps, of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer

from radlads.model.mixers.shared.mixer import MixerOutput, MixerState
from radlads.model.student.decoding.kept_layer import KeptLayer
from radlads.model.student.decoding.recent_tokens import Pass, check_take_back, mix_recorded, take_back
from radlads.model.student.decoding.saved_state import (
    copy_cache,
    join_caches,
    load_cache,
    save_cache,
    select_rows,
)


class RecurrentLayer(CacheLayerMixin):
    """State of one recurrent layer. Its size does not depend on the number of tokens processed."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None
        self.num_seen = 0
        self.record_past = False
        self.recent: list[Pass] = []

    def run(self, mix: Callable[..., MixerOutput], x_BTD: Tensor, **given: Any) -> MixerOutput:
        """Mix what is to be remembered: so that its last tokens can be taken back, where this was asked for."""
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            given["state"] = writable(given["state"])
        return mix_recorded(self.recent, mix, x_BTD, **given) if self.record_past else mix(x_BTD, **given)

    def remember(self, state: MixerState | None, num_tokens: int) -> None:
        """Replace the state by the one after `num_tokens` more tokens, padding included."""
        self.state = state
        self.num_seen += num_tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the mixer makes the first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a recurrent layer keeps a state, not keys and values")

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        self.state, self.num_seen, self.is_initialized = None, 0, False
        self.recent.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        """A no-op: a state is small and stays on its device."""

    def prefetch(self) -> None:
        """See `offload`."""

    def activate_past_recording(self) -> None:
        """From here on, the last tokens of a pass can be taken back by `crop`, until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens. tokens_to_remove: their number, negative, as transformers gives it. Raises
        ValueError where no more is known of the state before them."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove:
            self.state = take_back(self.recent, -tokens_to_remove)
            self.num_seen += tokens_to_remove
        self.recent.clear()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError where `crop` cannot be done."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: of the tokens to take back")
        if tokens_to_remove:
            check_take_back(self.recent, -tokens_to_remove)

    def _map(self, change: Any) -> None:
        self.recent.clear()
        if self.state is not None:
            self.state = MixerState(*(None if x is None else change(x) for x in self.state))


def writable(state: MixerState | None) -> MixerState | None:
    """A state that a step can change in place: not one that torch.inference_mode made, outside it."""
    if state is None or not any(x is not None and x.is_inference() for x in state):
        return state
    return MixerState(*(None if x is None else x.clone() for x in state))


class RadladsCache(Cache):
    """Per-layer memory for generation; `config` is a RadladsConfig. Kept layers with a window remember the window.

    Layers that are linear in the teacher get what transformers gives them there.
    """

    def __init__(self, config: Any, room: int = 0) -> None:
        """room: tokens for which kept layers take memory at once; more are taken as they come."""
        self.config = config
        self.for_one_call = False  # whether generate() made it for itself, so that nobody needs it afterwards
        softmax, converted, windowed = config.softmax_layers(), config.converted_layers(), config.windowed_layers()
        hybrid = len(softmax) < config.num_hidden_layers
        theirs = DynamicCache(config=config.teacher_config()).layers if hybrid else []
        layers: list[Any] = []
        for i in range(config.num_hidden_layers):
            if i not in softmax:
                layers.append(theirs[i])
            elif i in converted:
                layers.append(RecurrentLayer())
            elif i in windowed:
                layers.append(DynamicSlidingWindowLayer(sliding_window=config.teacher["sliding_window"]))
            else:
                layers.append(KeptLayer(room))
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, in all layers or, where one cannot, in none. See `RecurrentLayer.crop`."""
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def save(self, path: str | Path) -> Path:
        """Write what was read as a safetensors file; see `save_cache`."""
        return save_cache(self, path)

    @classmethod
    def load(cls, path: str | Path, config: Any, device: torch.device | str | None = None) -> RadladsCache:
        """The cache that `save` wrote, for a model with this config. Raises ValueError for a file of another model."""
        cache: RadladsCache = load_cache(cls(config), path, device)
        return cache

    def copy(self) -> RadladsCache:
        """A cache that goes its own way from here, for several continuations of one text."""
        cache: RadladsCache = copy_cache(self)
        return cache

    @classmethod
    def join(cls, caches: Sequence[RadladsCache]) -> RadladsCache:
        """One cache with the rows of all; see `join_caches`."""
        cache: RadladsCache = join_caches(caches)
        return cache

    def select(self, rows: Sequence[int], padding: int = 0) -> RadladsCache:
        """A cache with some rows alone; see `select_rows`."""
        cache: RadladsCache = select_rows(self, rows, padding)
        return cache

    def num_bytes(self) -> int:
        """Bytes of all states, keys and values."""
        held: list[torch.Tensor | None] = []
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                held += layer.state or ()
            elif isinstance(layer, CacheLayerMixin):
                held += (layer.keys, layer.values)
            else:
                held += (*layer.conv_states.values(), *layer.recurrent_states.values())
        return sum(x.numel() * x.element_size() for x in held if x is not None)
