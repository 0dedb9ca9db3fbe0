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
        """A token, [], by scores in fp32."""
        scores = logits_V[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator)[0]


def choose_tokens(logits_BV: Tensor, draws: Sequence[TokenDraw]) -> list[int | None]:
    """The next token of every row; None for a row whose scores are not numbers. Waits for the device once."""
    broken_B = logits_BV.isnan().any(-1)
    scores_BV = logits_BV.float().masked_fill(broken_B[:, None], 0)  # a draw among NaN ends the whole process
    token_B = scores_BV.argmax(-1)
    for row, draw in enumerate(draws):
        if not draw.is_greedy:
            token_B[row] = draw.draw(scores_BV[row])
    return [None if token < 0 else int(token) for token in token_B.masked_fill(broken_B, -1).tolist()]
