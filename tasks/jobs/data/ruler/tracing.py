"""RULER's variable tracking: which variables got a value, through a chain of assignments (2404.06654, section 3)."""

from __future__ import annotations

import itertools

from radlads.tasks.jobs.data.ruler.draw import Draw
from radlads.tasks.jobs.data.ruler.niah import NOISE
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle

HOPS = 4
LEAST_NOISE = HOPS + 1
_PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
# The misprint is RULER's own.
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are:"
)


def build_tracing(draw: Draw, units: int, length: int) -> Puzzle:
    """units: lines of noise around the chain. A solved example comes first, with shorter names."""
    example = _track(draw, 10 if length >= 4096 else LEAST_NOISE, letters=3)
    puzzle = _track(draw, units, letters=5)
    return Puzzle(
        prompt=f"{example.text}{example.reply}\n\n{puzzle.prompt}",
        prefix=puzzle.prefix,
        answers=puzzle.answers,
        reply=puzzle.reply,
    )


def _track(draw: Draw, units: int, letters: int) -> Puzzle:
    names, value = draw.letters(HOPS + 1, letters), draw.value()
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
    lines = [f"{NOISE}\n"] * units
    for moved, place in enumerate(sorted(draw.rng.sample(range(units), len(chain)))):
        lines.insert(place + moved, chain[moved])
    return Puzzle(
        prompt=_PROMPT.format(context=" ".join(lines), value=value),
        prefix=_PREFIX.format(count=len(names), value=value),
        answers=tuple(names),
        reply=f" {' '.join(names)}",
    )
