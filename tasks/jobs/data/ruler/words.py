"""RULER's aggregation: the most common words of a list, and of a coded text (2404.06654, section 3)."""

from __future__ import annotations

import math
import string

from radlads.tasks.jobs.data.ruler.draw import Draw
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle

COMMON = 10
LONG = 4096
"""Tokens from which on a list repeats its words as often as RULER's."""
SCARCE = 1
"""In place of a length: words repeat as seldom as can be asked for."""
LEAST_CODED = 80
"""Words of a coded text at which the fourth most frequent is ahead of the fifth."""
_LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_DOTS = "..."


def build_common(draw: Draw, units: int, length: int) -> Puzzle:
    """units: different words. Common ones appear 30 times and others 3 times; below LONG tokens 6 times and once, where
    SCARCE 4 times and once. A solved example comes first."""
    if length >= LONG:
        of_example, of_puzzle = (40, 10, 3), (30, 3)
    else:
        of_example, of_puzzle = ((14, 2, 1), (4, 1)) if length == SCARCE else ((20, 3, 1), (6, 1))
    example, puzzle = _count(draw, *of_example), _count(draw, units, *of_puzzle)
    prompt = f"{example.text}{example.reply}\n{puzzle.prompt}"
    return Puzzle(prompt, puzzle.prefix, puzzle.answers, puzzle.reply)


def _count(draw: Draw, different: int, often: int, seldom: int) -> Puzzle:
    words = draw.listed(different)
    common = words[:COMMON]
    listed = common * often + words[COMMON:] * seldom
    draw.rng.shuffle(listed)
    return Puzzle(
        prompt=_LIST.format(context=_numbered(listed)),
        prefix=_LIST_PREFIX,
        answers=tuple(common),
        reply=f" {_numbered(common)}",
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def build_frequent(draw: Draw, units: int, length: int) -> Puzzle:
    """units: coded words, the k-th most frequent one a share 1 / (ζ(2) k²) of them; the first is dots."""
    vocabulary = [_DOTS, *draw.letters(max(20, length // 50), 6, string.ascii_lowercase)]
    zeta = math.pi**2 / 6
    coded = [word for rank, word in enumerate(vocabulary, start=1) for _ in range(int(units / (zeta * rank**2)))]
    draw.rng.shuffle(coded)
    answers = tuple(vocabulary[1:4])
    return Puzzle(_CODED.format(context=" ".join(coded)), _CODED_PREFIX, answers, f" {', '.join(answers)}.")
