"""How much a text repeats itself: of the tokens of one sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

GRAM = 4
_REPEATS = 3
_SHORTEST_LOOP = 16  # tokens; shorter ones are ellipses, rules and the like


def distinct(ids: Sequence[int], n: int) -> float | None:
    """Distinct n-grams over all n-grams (distinct-n, Li et al. 2016, 1510.03055, of one sample); None: it has none."""
    grams = _grams(ids, n)
    return len(set(grams)) / len(grams) if grams else None


def repeated_share(ids: Sequence[int]) -> float | None:
    """Share of the tokens that lie inside a 4-gram that occurs twice or more; None without a token."""
    if not ids:
        return None
    grams = _grams(ids, GRAM)
    counts = Counter(grams)
    inside = {at + i for at, gram in enumerate(grams) if counts[gram] > 1 for i in range(GRAM)}
    return len(inside) / len(ids)


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens are one block, three times or more, over at least 16 tokens."""
    for period in range(1, len(ids) // _REPEATS + 1):
        length = max(_REPEATS * period, _SHORTEST_LOOP)
        if length > len(ids):
            continue
        tail = ids[len(ids) - length :]
        if tail[period:] == tail[:-period]:
            return True
    return False


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
