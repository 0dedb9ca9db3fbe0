"""The next token of every row, each by its own settings and seed.

Dims: B rows, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from radlads.tasks.contracts.requests.talk import Drawing


class TokenDraw:
    """How one row's tokens are chosen. Its random numbers are its own, whoever shares the batch."""

    def __init__(self, drawing: Drawing, device: torch.device) -> None:
        self._generator: torch.Generator | None = None
        self._warpers: list[TemperatureLogitsWarper | TopPLogitsWarper] = []
        if drawing.temperature == 0:
            return
        self._generator = torch.Generator(device)
        if drawing.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(drawing.seed)
        if drawing.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(drawing.temperature))
        if drawing.top_p < 1:
            self._warpers.append(TopPLogitsWarper(drawing.top_p))

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token."""
        return self._generator is None

    def draw(self, logits_V: Tensor) -> Tensor:
        """A token, []."""
        scores = logits_V[None].float()
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator)[0]


def choose_tokens(logits_BV: Tensor, draws: Sequence[TokenDraw]) -> list[int]:
    """The next token of every row; waits for the device once."""
    token_B = logits_BV.float().argmax(-1)
    for row, draw in enumerate(draws):
        if not draw.is_greedy:
            token_B[row] = draw.draw(logits_BV[row])
    return [int(token) for token in token_B.tolist()]
