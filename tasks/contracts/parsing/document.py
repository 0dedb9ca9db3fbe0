"""Strict validation of values from users and programs: small, finite, and representable in JSON.

Limits are checked before anything is built from the values, which bounds time and memory. yaml_reader.py reads YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from radlads.tasks.contracts.errors import UserError

MOST_BYTES = 256 * 1024
DEEPEST = 40
MOST_VALUES = 20_000
LARGEST = 2**53
"""Larger integers are not exact in JSON readers such as the Prefect UI."""
SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_SHOWN = 80


class DocumentError(UserError):
    """An invalid document or value; the message is one line with the fault, its location and the remedy."""


def plain_values(value: Any, *, where: str) -> Any:
    """A copy of a value as dicts with text keys, lists, text, finite numbers, booleans and None.

    Raises DocumentError, one line with the location, for values that JSON cannot represent or that exceed the limits.
    """
    return _Copier(where).copy(value, ())


def one_line(text: str, longest: int = 400) -> str:
    """Text for a message: whitespace collapsed, unprintable characters escaped, truncated to `longest`."""
    joined = " ".join(text[: 4 * longest].split())
    shown = "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in joined)
    return shown if len(shown) <= longest else f"{shown[:longest]}…"


def shown(value: Any) -> str:
    """A value for a message: its repr in one line, truncated."""
    return one_line(repr(value), _LONGEST_SHOWN)


class _Copier:
    def __init__(self, where: str) -> None:
        self._where = where
        self._count = 0

    def copy(self, value: Any, keys: tuple[str, ...]) -> Any:
        self._count += 1
        if self._count > MOST_VALUES:
            raise self._fault(keys, f"more than {MOST_VALUES:,} values; a recipe has a few hundred")
        if len(keys) > DEEPEST:
            raise self._fault(keys, f"nested more than {DEEPEST} deep")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise self._fault(keys, f"the key {shown(key)} is not text")
            return {self._text(key, keys): self.copy(item, (*keys, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(item, (*keys, str(number))) for number, item in enumerate(value)]
        if isinstance(value, str):
            return self._text(value, keys)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if abs(value) > LARGEST:
                raise self._fault(keys, "the number is too large: the limit for integers is 2**53")
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise self._fault(keys, f"{value} is not a finite number")
            return value
        raise self._fault(keys, f"a {type(value).__name__} cannot be represented in JSON")

    def _text(self, text: str, keys: tuple[str, ...]) -> str:
        if len(text) > MOST_BYTES:
            raise self._fault(keys, f"a text of {len(text):,} characters; at most {MOST_BYTES:,} are allowed")
        if SURROGATE.search(text):
            raise self._fault(keys, "half of a surrogate pair is not a character; write the character itself")
        return text

    def _fault(self, keys: tuple[str, ...], fault: str) -> DocumentError:
        location = ".".join(keys[:8]) + ("…" if len(keys) > 8 else "")
        return DocumentError(
            f"{self._where}: {one_line(location, 120)}: {fault}" if location else f"{self._where}: {fault}"
        )
