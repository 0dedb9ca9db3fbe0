"""RULER's needles in a haystack: eight tasks with the same question (2404.06654, section 3 and appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from radlads.tasks.jobs.data.ruler.draw import Draw, Kind
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = 40
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
)
_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)


@dataclass(frozen=True)
class Niah:
    """What tells the eight tasks apart."""

    haystack: Literal["noise", "essays", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    """Different keys in the haystack; those not asked for distract."""
    values: int = 1
    """Values of each key, all of them asked for."""
    queries: int = 1
    """Keys that are asked for."""

    @property
    def needles(self) -> int:
        return self.keys * self.values


def build_niah(task: Niah, draw: Draw, units: int, essays: Sequence[str]) -> Puzzle:
    """units: of haystack: lines of noise, sentences of the essays, or needles with keys that are not asked for."""
    others = units if task.haystack == "needles" else 0
    keys = draw.distinct(task.key, task.keys + others)
    values = draw.distinct(task.value, task.needles + others)
    own = {key: values[i * task.values : (i + 1) * task.values] for i, key in enumerate(keys[: task.keys])}
    needles = [_needle(task, key, value) for key, found in own.items() for value in found]
    draw.rng.shuffle(needles)
    if task.haystack == "essays":
        start = draw.rng.randrange(len(essays))
        hay = [essays[(start + i) % len(essays)] for i in range(units)]
        depths = sorted(draw.rng.sample(range(_DEPTHS), len(needles)))
        places = [units * depth // (_DEPTHS - 1) for depth in depths]
    else:
        distractors = zip(keys[task.keys :], values[task.needles :], strict=True)
        hay = [_needle(task, *pair) for pair in distractors] if others else [NOISE] * units
        places = sorted(draw.rng.sample(range(units), len(needles)))
    for moved, (place, needle) in enumerate(zip(places, needles, strict=True)):
        hay.insert(place + moved, needle)
    return _ask(task, (" " if task.haystack == "essays" else "\n").join(hay), own, draw)


def _needle(task: Niah, key: str, value: str) -> str:
    return f"One of the special magic {task.value} for {key} is: {value}."


def _ask(task: Niah, context: str, own: dict[str, list[str]], draw: Draw) -> Puzzle:
    asked = draw.rng.sample(list(own), task.queries)
    answers = tuple(value for key in asked for value in own[key])
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    one = len(answers) == 1
    kind = task.value.removesuffix("s") if one else task.value
    return Puzzle(
        prompt=(_ONE if one else _SEVERAL).format(kind=kind, context=context, query=query),
        prefix=f" The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}",
        answers=answers,
        reply=f" {', '.join(answers)}.",
    )
