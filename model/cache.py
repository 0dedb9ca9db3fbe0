"""Cache of a converted model: an fp32 state per recurrent layer, keys and values only where attention was kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from radlads.model.mixer import MixerState


class RecurrentLayer(LinearAttentionCacheLayerMixin):
    """State of one recurrent layer. Its size does not depend on how many tokens were seen."""

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate: the mixer makes the first state."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        raise NotImplementedError("the mixer's state is kept in `state`")

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:
        raise NotImplementedError("the mixer's state is kept in `state`")

    def reset(self) -> None:
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a recurrent state cannot forget its last tokens; keep a copy of the cache instead of cropping"
            )

    def _map(self, change: Any) -> None:
        if self.state is not None:
            self.state = MixerState(*(None if x is None else change(x) for x in self.state))


class RadladsCache(Cache):
    """Per-layer memory for generation; `config` is a RadladsConfig.

    Counts the tokens itself: transformers' own cache cannot tell its length when no layer is softmax attention.
    """

    def __init__(self, config: Any) -> None:
        kept = set(config.attention_layers)
        super().__init__(
            layers=[DynamicLayer() if i in kept else RecurrentLayer() for i in range(config.num_hidden_layers)]
        )
        self.num_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.num_seen

    def reset(self) -> None:
        super().reset()
        self.num_seen = 0

    @property
    def is_initialized(self) -> bool:
        return self.num_seen > 0

    def num_bytes(self) -> int:
        """Memory held by all states, keys and values."""
        held: list[torch.Tensor | None] = []
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                held += layer.state or ()
            else:
                held += (layer.keys, layer.values)
        return sum(x.numel() * x.element_size() for x in held if x is not None)
