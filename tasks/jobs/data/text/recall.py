"""Recall text: facts hidden in a haystack of ordinary sentences, with questions about them at the end.

The same format trains recall (the `recall` data source) and measures it (the needle stage):

    fact      The red dog says castle drum.
    question  What does the red dog say? The red dog says
    answer    castle drum

It is the single- and multi-key retrieval of RULER (2404.06654) with words that a very small model knows. The depth of
a fact is its relative position: 0 is the start of the haystack, 1 its end, just before the question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import COMPRESSED
from radlads.tasks.jobs.data.text.text_files import JSON_SUFFIXES, clean, clean_documents, json_rows
from radlads.tasks.jobs.data.text.token_encoder import BARE, Frame, text_ids

_BUILT_IN_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_ADJECTIVES = (
    "red blue green yellow pink white black brown big small little old new happy sad funny brave shy soft cold warm "
    "pretty fast slow loud quiet round tiny shiny silly"
).split()
_NOUNS = (
    "dog cat bird fish bear frog duck cow pig hen fox bunny mouse ball car boat train doll hat shoe box tree flower "
    "house cake apple truck robot kite spoon"
).split()
_VALUES = (
    "river moon star stone bridge garden castle window pencil button candle ladder rocket pumpkin cookie "
    "pillow blanket ribbon ticket rainbow forest island mountain ocean desert village kitchen basket "
    "bucket hammer trumpet guitar drum piano violin mirror carpet lemon banana carrot potato pepper onion "
    "peach cherry melon cloud thunder lantern wagon tunnel harbor meadow canyon feather marble puzzle "
    "crayon whistle anchor"
).split()
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+")


@dataclass(frozen=True)
class Fact:
    """A key and the value to recall for it."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        return f"The {self.key} says {self.value}."

    @property
    def question(self) -> str:
        """The question, up to the answer, without the space before it."""
        return f"What does the {self.key} say? The {self.key} says"


@dataclass(frozen=True)
class Case:
    """One prompt of the needle grid and the string that its continuation must contain."""

    prompt: str
    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Quiz:
    """A document with facts, questions and answers, for scoring without generation."""

    text: str
    ids: list[int]
    answers: list[int]
    """For each token, the number (from 1) of the answer that it belongs to; 0 elsewhere. [tokens]"""


def load_filler(paths: Sequence[str | Path], separator: str | None = None) -> list[str]:
    """Sentences of the given files (plain or compressed), in order; the built-in filler if no file is given. Of JSON
    lines the field `text` is taken.

    separator: the text between documents of a text file; never part of a sentence. Raises UserError for an unreadable
    file and for a file without sentences.
    """
    if not paths:
        return list(_BUILT_IN_FILLER)
    return [sentence for path in map(Path, paths) for sentence in _sentences(path, separator, _state(path))]


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=4)
def _sentences(path: Path, separator: str | None, _state: tuple[int, int]) -> tuple[str, ...]:
    """Of one file, which is not split again while it stays the same: needles and RULER often share their haystack."""
    documents = _rows_texts(path) if _is_json(path) else (text for _, text, _ in clean_documents(path, separator))
    parts = tuple(s for document in documents for s in _SENTENCE_END.split(" ".join(document.split())) if s)
    if not parts:
        raise UserError(f"{path}: contains no sentences; give a text file in `haystack`")
    return parts


def _is_json(path: Path) -> bool:
    return (Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix) in JSON_SUFFIXES


def _rows_texts(path: Path) -> Iterator[str]:
    for line, row in json_rows(path):
        text = row.get("text")
        if not isinstance(text, str):
            raise UserError(f"{path}, line {line}: no field 'text' with text; a haystack of JSON lines needs it")

        def place(_at: int, line: int = line) -> str:
            return f"{path}, line {line}"

        yield clean(text, place, replace=False)[0]


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Draw `count` facts with distinct keys. Raises UserError if there are not enough keys."""
    total = len(_ADJECTIVES) * len(_NOUNS)
    if count > total:
        raise UserError(f"{count} facts requested, but there are only {total} distinct keys; use fewer facts")
    keys = [
        f"{_ADJECTIVES[i % len(_ADJECTIVES)]} {_NOUNS[i // len(_ADJECTIVES)]}" for i in rng.sample(range(total), count)
    ]
    # Two words: a random guess is right once in thousands. Values and keys share no words.
    return [Fact(key, " ".join(rng.sample(_VALUES, 2))) for key in keys]


def build_case(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[str],
    *,
    length: int,
    depth: float,
    rng: random.Random,
    num_facts: int = 1,
    frame: Frame = BARE,
) -> Case:
    """A prompt of at most `length` tokens, within one sentence of it, with the queried fact at `depth` in [0, 1].

    The other num_facts − 1 facts are distractors at random depths. frame: tokens before the prompt, counted in
    `length`. Raises UserError if facts and question do not fit in `length`.
    """
    facts = draw_facts(rng, num_facts)
    queried = facts[0]
    fixed = [fact.sentence for fact in facts] + [queried.question]
    length -= len(frame.before)
    sentences = _filler_of(tokenizer, filler, _room(tokenizer, fixed, length), rng)
    while True:
        places = [(depth, queried.sentence)] + [(rng.random(), fact.sentence) for fact in facts[1:]]
        prompt = " ".join([*_insert(sentences, places), queried.question])
        (ids,) = text_ids(tokenizer, [prompt])
        if len(ids) <= length:
            return Case(prompt, [*frame.before, *ids], queried.value)
        # Joined text can have more tokens than its parts; drop a sentence.
        if not sentences:
            raise UserError(_too_short(length, len(ids)))
        sentences.pop()


def build_document(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[str],
    *,
    length: int,
    rng: random.Random,
    most_facts: int | None = None,
) -> str:
    """Training text for recall, up to about `length` tokens, of one of three kinds.

    30 %: a repeated list of random words, which trains copying. 40 %: facts followed directly by all questions and
    answers. 30 %: facts scattered in a haystack, with questions and answers at the end. Only the last kind fills
    `length`; a small model does not learn recall without the short ones. most_facts: per document; None: 8 in a
    haystack, 10 without one.
    """
    kind = rng.random()
    if kind < 0.3:
        words = [rng.choice(rng.choice(filler).split()) for _ in range(rng.randint(8, max(9, min(80, length // 4))))]
        return " ".join(words * rng.randint(2, 3))
    most = max(1, min(most_facts or (10 if kind < 0.7 else 8), length // 28))
    facts = draw_facts(rng, rng.randint(1, most))
    answers = [f"{fact.question} {fact.value}." for fact in facts]
    rng.shuffle(answers)
    if kind < 0.7:
        return " ".join([*(fact.sentence for fact in facts), *answers])
    room = _room(tokenizer, [*(fact.sentence for fact in facts), *answers], length, strict=False)
    sentences = _filler_of(tokenizer, filler, room, rng)
    return " ".join([*_insert(sentences, [(rng.random(), fact.sentence) for fact in facts]), *answers])


def build_quiz(tokenizer: PreTrainedTokenizerBase, filler: Sequence[str], *, length: int, rng: random.Random) -> Quiz:
    """Facts scattered in a haystack, then every question with its answer, in at most `length` tokens.

    For teacher-forced scoring of the answer tokens, without generation. One fact per 32 tokens, at most eight. Raises
    UserError if not even one fact fits in `length`.
    """
    num_facts = max(1, min(8, length // 32))
    while True:
        facts = draw_facts(rng, num_facts)
        queried = rng.sample(facts, num_facts)
        fixed = [*(fact.sentence for fact in facts), *(f"{fact.question} {fact.value}." for fact in queried)]
        room = _room(tokenizer, fixed, length, strict=num_facts == 1)
        if room >= 0:
            break
        num_facts -= 1
    sentences = _filler_of(tokenizer, filler, room, rng)
    places = [(rng.random(), fact.sentence) for fact in facts]
    while True:
        text = " ".join(_insert(sentences, places))
        bounds = [0]
        for fact in queried:
            text += f" {fact.question}"
            bounds.append(_count(tokenizer, text))
            text += f" {fact.value}"
            bounds.append(_count(tokenizer, text))
            text += "."
        (ids,) = text_ids(tokenizer, [text])
        if len(ids) <= length:
            break
        if not sentences:
            raise UserError(_too_short(length, len(ids)))
        sentences.pop()
    answers = [0] * len(ids)
    for number in range(1, num_facts + 1):
        for place in range(bounds[2 * number - 1], bounds[2 * number]):
            answers[place] = number
    return Quiz(text, ids, answers)


def vocabulary() -> list[str]:
    """All words used in facts, sorted."""
    return sorted({*_ADJECTIVES, *_NOUNS, *_VALUES})


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(text_ids(tokenizer, [text])[0])


def _room(tokenizer: PreTrainedTokenizerBase, fixed: Sequence[str], length: int, *, strict: bool = True) -> int:
    """Tokens remaining for filler beside the required sentences."""
    used = _count(tokenizer, " ".join(fixed))
    if strict and used > length:
        raise UserError(_too_short(length, used))
    return length - used


def _too_short(length: int, needed: int) -> str:
    return f"a needle prompt of {length} tokens is too short for its fact and question ({needed} tokens)"


def _filler_of(tokenizer: PreTrainedTokenizerBase, filler: Sequence[str], room: int, rng: random.Random) -> list[str]:
    """Consecutive filler sentences (cyclic, from a random start) that fill `room` tokens."""
    start = rng.randrange(len(filler))
    chosen: list[str] = []
    index = start
    while room > 0:
        # Batches amortise the tokenizer's call overhead.
        batch = [filler[(index + i) % len(filler)] for i in range(16)]
        for sentence, ids in zip(batch, text_ids(tokenizer, [" " + s for s in batch]), strict=True):
            if len(ids) > room:
                return chosen
            chosen.append(sentence)
            room -= len(ids)
        index += 16
    return chosen


def _insert(sentences: Sequence[str], places: Sequence[tuple[float, str]]) -> list[str]:
    """Insert each (depth, sentence) of `places` into the sentences at its depth."""
    slots: dict[int, list[str]] = {}
    for depth, sentence in places:
        slots.setdefault(round(depth * len(sentences)), []).append(sentence)
    result: list[str] = []
    for index in range(len(sentences) + 1):
        result += slots.get(index, [])
        result += sentences[index : index + 1]
    return result
