"""The states of all rows that are continued together, and a step of all of them.

Rows come and go between steps. A recurrent state has one size, so rows of any length share a batch; where layers stayed
attention, shorter rows are padded on the left under a mask. Rows of a model whose memory cannot be joined (windows,
layers that are linear attention in the teacher) are continued one after the other.

Dims: B rows, T tokens that the longest row has read, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from radlads.model.student.cache import RadladsCache, RecurrentLayer
from radlads.model.student.decoding.recorded_steps import DECODING_STEP
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.student.releases import cache_keyword


def joins_rows(model: RadladsForCausalLM) -> bool:
    """Whether rows of this model can share a batch."""
    config = model.config
    return (
        not config.windowed_layers()
        and len(config.softmax_layers()) == config.num_hidden_layers
        and all(mixer.RECURRENT for mixer in model.mixers().values())
        and (not config.attention_layers or model.config._attn_implementation == "sdpa")  # which takes such a mask
    )


class RowStates:
    """What a model remembers of each row. `advance` is all that knows how a step is computed."""

    def __init__(self, model: RadladsForCausalLM) -> None:
        self._model, self._keyword = model, cache_keyword(model.model)
        self.joins = joins_rows(model)
        self.lengths: list[int] = []
        """Tokens that each row has read."""
        self._caches: list[RadladsCache] = []  # one of all rows, or one of each

    def read(self, cache: RadladsCache, ids: Sequence[int]) -> Tensor:
        """Read a piece of one row's prompt into its cache; the logits [1,V] after it."""
        tokens, seen = torch.tensor([list(ids)], device=self._model.device), cache.get_seq_length()
        positions = torch.arange(seen, seen + len(ids), device=tokens.device)[None]
        return self._pass(tokens, positions, cache, logits_to_keep=1)

    def add(self, caches: Sequence[RadladsCache], lengths: Sequence[int]) -> None:
        """Further rows, each with a cache of one row that has read so many tokens."""
        if caches:
            held = [*self._caches, *caches]
            self._caches = [RadladsCache.join(held)] if self.joins and len(held) > 1 else held
            self.lengths += lengths

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all other rows."""
        if len(rows) == len(self.lengths):
            return
        self.lengths = [self.lengths[row] for row in rows]
        if not self.joins:
            self._caches = [self._caches[row] for row in rows]
        elif not rows:
            self._caches = []
        else:
            joined = self._caches[0]
            self._caches = [joined.select(rows, joined.get_seq_length() - max(self.lengths))]

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Read one token of every row; the logits [B,V] of the next ones."""
        token_B1 = torch.tensor(tokens, device=self._model.device)[:, None]
        position_B1 = torch.tensor(self.lengths, device=token_B1.device)[:, None]
        self.lengths = [length + 1 for length in self.lengths]
        if self.joins:
            mask = self._mask(position_B1)
            return self._pass(token_B1, position_B1, self._caches[0], attention_mask=mask, **{DECODING_STEP: True})
        apart = zip(token_B1.split(1), position_B1.split(1), self._caches, strict=True)
        return torch.cat([self._pass(token_11, position_11, cache) for token_11, position_11, cache in apart])

    def _mask(self, position_B1: Tensor) -> Tensor | None:
        """What kept layers see, [B,1,1,T+1]; None: everything."""
        longest = max(self.lengths)
        if min(self.lengths) == longest or all(isinstance(one, RecurrentLayer) for one in self._caches[0].layers):
            return None
        place_T = torch.arange(longest, device=position_B1.device)
        return (place_T >= longest - 1 - position_B1)[:, None, None]

    def _pass(self, tokens_BT: Tensor, positions_BT: Tensor, cache: RadladsCache, **given: object) -> Tensor:
        """The logits [B,V] after the last token."""
        given |= {self._keyword: cache, "use_cache": True}
        logits: Tensor = self._model(input_ids=tokens_BT, position_ids=positions_BT, **given).logits
        return logits[:, -1]
