"""The choice of the next token: greedy or sampled, as generate() does it, also as a part of a recorded step.

Dims: B rows, V words. An exported model carries this file.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

# What these do depends on the scores alone, by operations that a CUDA graph can hold.
_OF_SCORES = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "TypicalLogitsWarper",
)


def can_be_recorded(processors: Any) -> bool:
    """Whether a step may choose its token itself: no processor looks at the text so far."""
    return all(type(processor).__name__ in _OF_SCORES for processor in processors)


def what_chooses(processors: Any, *, do_sample: bool) -> Hashable:
    """Equal for processors that choose alike."""
    told = (
        (type(one).__name__, tuple(sorted((name, str(value)) for name, value in vars(one).items())))
        for one in processors
    )
    return do_sample, tuple(told)


def choose(logits_BV: Tensor, processors: Callable[..., Tensor], ids: Tensor | None, *, do_sample: bool) -> Tensor:
    """The next token of every row [B]. ids: the text so far, for processors that look at it."""
    scores = processors(ids, logits_BV.to(copy=True, dtype=torch.float32))
    if not do_sample:
        return torch.argmax(scores, dim=-1)
    # torch.multinomial for one sample, without its questions to the host: a race of exponential clocks.
    chances = torch.nn.functional.softmax(scores, dim=-1)
    return (chances / torch.empty_like(chances).exponential_(1)).argmax(-1)


class Chooser:
    """Chooses tokens inside a step."""

    def __init__(self, processors: Any, config: Any, eos: Tensor | None) -> None:
        """config: a GenerationConfig as generate() has prepared it. eos: [E], tokens that end a row."""
        self.processors, self.do_sample, self.pad = processors, config.do_sample, config._pad_token_tensor
        self.eos = eos

    def __call__(self, logits_BV: Tensor, unfinished_B: Tensor) -> Tensor:
        """The next tokens [B]; rows that have ended are padded, and those that end now are noted."""
        token_B = choose(logits_BV, self.processors, None, do_sample=self.do_sample)
        if self.eos is not None:
            token_B = torch.where(unfinished_B, token_B, self.pad)
            unfinished_B.logical_and_((token_B[:, None] != self.eos).all(-1))
        return token_B
