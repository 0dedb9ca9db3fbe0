"""Constraints on an answer that a program can check exactly, after IFEval (Zhou et al. 2023, 2311.07911)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from radlads.tasks.contracts.errors import UserError, did_you_mean

_WORD = re.compile(r"\w+(?:[’'-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…]+[\"”’')\]]*(?:\s+|$)")
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_WORDS = ("river", "window", "garden", "silver", "morning", "bridge", "winter", "music", "market", "orange")
_PHRASES = ("In short,", "Certainly,", "Here is my answer:", "Good question.")
_LONG_WORD = 5  # characters, of a word that is worth forbidding


@dataclass(frozen=True)
class _ConstraintKind:
    """One kind of constraint."""

    takes: type | None
    """Of its value: a number from 1, text, or none."""
    ask: Callable[[Any], str]
    """Value → the sentence that is added to the question."""
    holds: Callable[[str, Any], bool]
    """Whether an answer, which is not empty, obeys."""
    draw: Callable[[random.Random, str], Any] = lambda _rng, _question: None
    not_with: tuple[str, ...] = ()
    """Kinds of which one question has no second one beside this."""


def _has_word(answer: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


def _words(answer: str) -> int:
    return len(_WORD.findall(answer))


def _sentences(answer: str) -> int:
    return sum(1 for piece in _SENTENCE_END.split(answer) if _WORD.search(piece))


def _is_json(answer: str) -> bool:
    fenced = _FENCED.fullmatch(answer)
    try:
        return isinstance(json.loads(fenced[1] if fenced else answer, parse_constant=_no_number), dict | list)
    except (ValueError, RecursionError):
        return False


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # which Python reads all the same


def _wanted_word(rng: random.Random, question: str) -> str:
    return rng.choice([word for word in _WORDS if not _has_word(question, word)] or list(_WORDS))


def _unwanted_word(rng: random.Random, question: str) -> str:
    """One of the longest of the question, which an answer would use."""
    words: list[str] = re.findall(r"[^\W\d_]+", question)
    found = sorted({word.lower() for word in words if len(word) >= _LONG_WORD})
    return rng.choice(sorted(found, key=len)[-3:] or list(_WORDS))


_KINDS: dict[str, _ConstraintKind] = {
    "max_words": _ConstraintKind(
        int,
        lambda n: f"Use at most {n} words.",
        lambda answer, n: _words(answer) <= n,
        lambda rng, _: rng.choice((20, 30, 50)),
        ("min_words",),
    ),
    "min_words": _ConstraintKind(
        int,
        lambda n: f"Use at least {n} words.",
        lambda answer, n: _words(answer) >= n,
        lambda rng, _: rng.choice((30, 50, 80)),
        ("max_words", "json"),
    ),
    "sentences": _ConstraintKind(
        int,
        lambda n: f"Answer in exactly {n} sentence{'s' if n > 1 else ''}.",
        lambda answer, n: _sentences(answer) == n,
        lambda rng, _: rng.randint(1, 4),
        ("bullets", "json"),
    ),
    "keyword": _ConstraintKind(str, lambda w: f"Use the word “{w}” in your answer.", _has_word, _wanted_word),
    "forbidden": _ConstraintKind(
        str,
        lambda w: f"Do not use the word “{w}” in your answer.",
        lambda answer, w: not _has_word(answer, w),
        _unwanted_word,
    ),
    "lower_case": _ConstraintKind(
        None,
        lambda _: "Write your whole answer in lower case letters.",
        lambda answer, _: answer == answer.lower() and any(map(str.isalpha, answer)),
        not_with=("starts_with",),
    ),
    "json": _ConstraintKind(
        None,
        lambda _: "Give your answer as one valid JSON object and write nothing else.",
        lambda answer, _: _is_json(answer),
        not_with=("min_words", "sentences", "starts_with", "bullets"),
    ),
    "starts_with": _ConstraintKind(
        str,
        lambda phrase: f"Your answer must begin with exactly “{phrase}” and go on from there.",
        str.startswith,
        lambda rng, _: rng.choice(_PHRASES),
        ("lower_case", "json"),
    ),
    "bullets": _ConstraintKind(
        int,
        lambda n: f"Answer with a list of exactly {n} bullet points, lines that begin with “- ”.",
        lambda answer, n: len(_BULLET.findall(answer)) == n,
        lambda rng, _: rng.randint(2, 5),
        ("sentences", "json"),
    ),
}
CONSTRAINTS = tuple(_KINDS)
"""Names of the kinds."""


@dataclass(frozen=True)
class Constraint:
    """One condition on an answer."""

    kind: str
    value: int | str | None = None

    @property
    def text(self) -> str:
        """The sentence that asks for it."""
        return _KINDS[self.kind].ask(self.value)

    def holds(self, answer: str) -> bool:
        """Whether the answer obeys. An empty one obeys nothing; white space around it does not count."""
        answer = answer.strip()
        return bool(answer) and _KINDS[self.kind].holds(answer, self.value)


def draw_constraints(question: str, index: int, rng: random.Random) -> tuple[Constraint, ...]:
    """One or two constraints for the question of that index; kinds in turn, the second of a kind that goes with it."""
    first = CONSTRAINTS[index % len(CONSTRAINTS)]
    kinds = [first]
    if rng.random() < 0.5:
        kinds.append(rng.choice([kind for kind in CONSTRAINTS if kind not in (first, *_KINDS[first].not_with)]))
    drawn = [Constraint(kind, _KINDS[kind].draw(rng, question)) for kind in kinds]
    if len({one.value for one in drawn if isinstance(one.value, str)}) < sum(isinstance(o.value, str) for o in drawn):
        return (drawn[0],)  # a word both wanted and unwanted
    return tuple(drawn)


def read_constraint(raw: Any, where: str) -> Constraint:
    """A constraint of a file, {kind, value}. Raises UserError."""
    kind, value = (raw.get("kind"), raw.get("value")) if isinstance(raw, Mapping) else (None, None)
    if not isinstance(kind, str) or kind not in _KINDS:
        hint = did_you_mean(str(kind), list(CONSTRAINTS), cutoff=0.5)
        raise UserError(f"{where}: a constraint has no `kind` of {', '.join(CONSTRAINTS)}{hint}")
    takes = _KINDS[kind].takes
    if takes is int and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        raise UserError(f"{where}: the constraint {kind} needs a `value`, a whole number from 1")
    if takes is str and not (isinstance(value, str) and value and value == value.strip()):
        raise UserError(f"{where}: the constraint {kind} needs a `value`, a text without white space at its ends")
    if takes is None and value is not None:
        raise UserError(f"{where}: the constraint {kind} has no value; leave it out")
    return Constraint(kind, value)
