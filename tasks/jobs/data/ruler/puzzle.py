"""One prompt of RULER, and the search for as much haystack as a length holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MOST_TRIES = 16
# A prompt is long enough if at most this share of its length is left.
_SLACK = 1 / 50
_AIM = 0.99  # of what is left: a little too long is a try lost


@dataclass(frozen=True)
class Puzzle:
    """A prompt and what must be found in the reply."""

    prompt: str
    prefix: str
    """The beginning of the answer, which the model continues; with the space or line break before it."""
    answers: tuple[str, ...]
    reply: str
    """The answers as a text that continues the prefix, for training."""

    @property
    def text(self) -> str:
        """Prompt and prefix, as a model without a chat template reads them."""
        return self.prompt + self.prefix


@dataclass(frozen=True)
class Fitted:
    """A puzzle and its size."""

    puzzle: Puzzle
    units: int
    """Of haystack."""
    cost: int
    """In tokens, of prompt and answer."""
    room: int

    @property
    def is_full(self) -> bool:
        """Whether no unit more was needed."""
        return self.room - self.cost <= max(2.0, self.room * _SLACK)


def fit(
    build: Callable[[int], Puzzle],
    cost: Callable[[Puzzle], int],
    room: int,
    *,
    least: int,
    most: int | None = None,
    guess: int | None = None,
) -> Fitted:
    """The puzzle with the most units of haystack, from `least` to `most`, that costs at most `room` tokens, or 98 %
    of it.

    By interpolation, because the cost grows evenly; guess: where to look first. If `least` costs more than `room`, it
    is what is returned.
    """

    def at(units: int) -> Fitted:
        puzzle = build(units)
        return Fitted(puzzle, units, cost(puzzle), room)

    low, high = at(least), None
    rate = 0.0
    for _ in range(_MOST_TRIES):
        if low.cost > room or low.is_full or low.units == most or (high and high.units - low.units <= 1):
            break
        if high is not None:
            rate = (high.cost - low.cost) / (high.units - low.units)
        step = int(_AIM * (room - low.cost) / rate) if rate > 0 else (guess or 3 * least + 8) - low.units
        units = low.units + max(1, step)
        units = min(units, *((high.units - 1,) if high else ()), *((most,) if most else ()), 1 << 40)
        found = at(units)
        rate = (found.cost - low.cost) / (found.units - low.units)
        if found.cost <= room:
            low = found
        else:
            high = found
    return low
