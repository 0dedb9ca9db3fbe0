"""Random words, numbers and names of RULER's prompts, in two halves that share no string: one for judging, one for
training.

A string belongs to the half that its CRC-32 says, so what trains can never ask for, or answer, what judging asks.
"""

from __future__ import annotations

import random
import string
import uuid
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal

from radlads.tasks.contracts.errors import UserError

Half = Literal["judging", "training"]
Kind = Literal["words", "numbers", "uuids"]

_ADJECTIVES = (
    "able amber ancient angry awake bitter blank blunt bold brief bright broad calm careful cheap chilly clean clever "
    "coarse crisp curious damp daring dense distant dizzy dusty eager early elder empty faint fancy fierce final firm "
    "foggy fond formal fresh frosty gentle giddy golden grand grave greedy harsh hasty hollow honest humble icy idle "
    "jolly keen late lazy level lively local lonely lucky mellow merry mild misty modest narrow neat noble odd pale "
    "patient plain polite proud quick rapid rare ready rough royal rural rusty salty sandy scarce shallow sharp "
    "sleepy slim smooth solid sour spare steady steep stern stiff strict sturdy subtle sudden sunny swift tame tender "
    "thick thin tidy timid tough urban vague vast vivid wary weary wicked wise witty young zealous"
).split()
_NOUNS = (
    "acorn anchor ankle apple apron arrow atlas badge bagel banjo barn basin beach beacon beetle bell bench berry "
    "bike blade blanket boot bottle bowl branch brick bridge broom brush bucket cabin cable camel camera candle canoe "
    "canyon cape castle cedar chain chair chalk cherry chest chimney circle cliff clock cloud clover coat comet "
    "copper coral cotton cradle crane crown curtain desert diary dolphin donkey dragon drum eagle elbow engine falcon "
    "feather fence ferry field flute forest fork fountain garden garlic glove goose grape guitar hammer harbor hazel "
    "hedge helmet heron hill honey horn island ivory jacket jewel jungle kettle kitten ladder lagoon lantern leaf "
    "lemon lentil lily lizard magnet maple marble market meadow melon mirror mitten monkey mortar moss needle nest "
    "oasis ocean olive onion orchard otter oven owl paddle palace parcel parrot peach pebble pencil pepper piano "
    "pigeon pillow planet plum pocket poem pond potato prairie prism puzzle quartz quilt rabbit raft ribbon river "
    "robin rocket saddle sail salmon scarf shell shovel silver sparrow spoon statue sugar summit tablet temple "
    "thistle thunder ticket timber tulip tunnel turtle valley velvet violin wagon walnut whistle willow window winter"
).split()


class Draw:
    """A random generator for the parts of one prompt; a function of the seed."""

    def __init__(self, seed: str, half: Half) -> None:
        self.rng = random.Random(seed)
        self.half = half

    def distinct(self, kind: Kind, count: int) -> list[str]:
        """Different strings: words such as `calm-river`, numbers of seven digits, or uuids."""
        if kind == "words":
            return self._sample(keys(self.half), count, "keys")
        return self._many(self._number if kind == "numbers" else self._uuid, count)

    def listed(self, count: int) -> list[str]:
        """Different words, none of which is part of another."""
        return self._sample(listed_words(self.half), count, "words")

    def letters(self, count: int, length: int, alphabet: str = string.ascii_uppercase) -> list[str]:
        """Different strings of random letters."""
        return self._many(lambda: "".join(self.rng.choices(alphabet, k=length)), count)

    def value(self) -> str:
        """A number of five digits."""
        return self._many(lambda: str(self.rng.randint(10_000, 99_999)), 1)[0]

    def _number(self) -> str:
        return str(self.rng.randint(1_000_000, 9_999_999))

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def _many(self, make: Callable[[], str], count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            text = make()
            if half_of(text) == self.half:
                found[text] = None
        return list(found)

    def _sample(self, pool: tuple[str, ...], count: int, what: str) -> list[str]:
        if count > len(pool):
            raise UserError(f"a prompt would need {count} {what}, and there are {len(pool)}; use shorter lengths")
        return self.rng.sample(pool, count)


def half_of(text: str) -> Half:
    """The half that a string belongs to."""
    return "training" if zlib.crc32(text.encode()) & 1 else "judging"


@cache
def keys(half: Half) -> tuple[str, ...]:
    """All adjective-noun pairs of a half."""
    return tuple(key for a in _ADJECTIVES for n in _NOUNS if half_of(key := f"{a}-{n}") == half)


@cache
def listed_words(half: Half) -> tuple[str, ...]:
    """Compounds of two nouns of a half, none of which contains another one: answers are found as parts of a text."""
    return tuple(word for word in _compounds() if half_of(word) == half)


@cache
def _compounds() -> tuple[str, ...]:
    pool = {a + b for a in _NOUNS for b in _NOUNS if a != b}
    shortest = min(map(len, pool))

    def parts(word: str) -> Iterator[str]:
        for start in range(len(word) - shortest + 1):
            yield from (word[start:end] for end in range(start + shortest, len(word) + 1) if end - start < len(word))

    return tuple(word for word in sorted(pool) if not any(part in pool for part in parts(word)))
