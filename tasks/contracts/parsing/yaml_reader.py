"""A strict reader for YAML recipes: unambiguous and limited in size.

Scalars follow the core schema of YAML 1.2, with two additions: `1_000` and `1e6` are integers. Text that YAML 1.1 and
1.2 read differently (`010`), duplicate keys, and tags are rejected, with line and column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from radlads.tasks.contracts.parsing.document import (
    DEEPEST,
    LARGEST,
    MOST_BYTES,
    MOST_VALUES,
    SURROGATE,
    DocumentError,
    one_line,
    shown,
)

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_PADDED = re.compile(r"[-+]?0[0-9_]+")
_FRACTION = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_OPEN = object()


def read_yaml(data: bytes, *, where: str) -> Any:
    """Parse a YAML file with one document to dicts with text keys, lists and scalars, without shared objects.

    where: the file name for messages. Raises DocumentError, one line: `where:line:column: ...`.
    """
    if len(data) > MOST_BYTES:
        raise DocumentError(f"{where}: too large: the limit is {MOST_BYTES:,} bytes; recipes have a few thousand")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = f"byte 0x{data[error.start]:02x} is not UTF-8 text; save the file as UTF-8"
        raise DocumentError(f"{where}:{line}: {fault}") from None
    return parse_yaml(text, where=where)


def parse_value(text: str, *, where: str) -> Any:
    """As parse_yaml, for a value on the command line: messages name no line and column."""
    return parse_yaml(text, where=where, locate=False)


def parse_yaml(text: str, *, where: str, locate: bool = True) -> Any:
    """As read_yaml, for text. Raises DocumentError."""
    if len(text) > MOST_BYTES:
        raise DocumentError(f"{where}: too large: the limit is {MOST_BYTES:,} characters")
    bad = _UNREADABLE.search(text)
    if bad is not None:
        line, column = text.count("\n", 0, bad.start()) + 1, bad.start() - text.rfind("\n", 0, bad.start())
        place = f"{where}:{line}:{column}" if locate else where
        raise DocumentError(
            f"{place}: the character U+{ord(bad[0]):04X} is not allowed in YAML; remove it, or write "
            "it as an escape in double quotes"
        )
    try:
        return _Builder(text, where, locate).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark and locate else where
        fault = ", ".join(part for part in (error.context, error.problem) if part)
        raise DocumentError(f"{place}: not valid YAML: {one_line(fault)}") from None
    except yaml.YAMLError as error:
        raise DocumentError(f"{where}: not valid YAML: {one_line(str(error))}") from None


def dump_yaml(values: Any) -> str:
    """YAML that read_yaml and YAML 1.1 readers parse to the same values."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    # PyYAML writes Unicode line breaks and byte-order marks unescaped, but does not read them back unchanged.
    if re.search("[\x85\u2028\u2029\ufeff]", text):
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if text in _WORDS or any(form.fullmatch(text) for form in _NUMBERS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_NUMBERS = (_WHOLE, _PADDED, _FRACTION, _NOT_FINITE)
_Dumper.add_representer(str, _represent_text)


class _Builder:
    """Builds values from parser events, with limits on their number and depth."""

    def __init__(self, text: str, where: str, locate: bool) -> None:
        self._events: Iterator[Event] = yaml.parse(text, Loader=_LOADER)
        self._where, self._locate = where, locate
        self._anchors: dict[str, Any] = {}
        self._count = 0

    def document(self) -> Any:
        event = self._next(StreamStartEvent)
        event = next(self._events)
        if isinstance(event, StreamEndEvent):
            return None
        assert isinstance(event, DocumentStartEvent)
        value = self._value(next(self._events), 1)
        self._next(DocumentEndEvent)
        event = next(self._events)
        if not isinstance(event, StreamEndEvent):
            raise self._fault(event, "a second document starts here; only one is allowed")
        return value

    def _next(self, kind: type[Event]) -> Event:
        event = next(self._events)
        assert isinstance(event, kind), event
        return event

    def _value(self, event: Event, depth: int) -> Any:
        self._enter(event, depth, 1)
        if isinstance(event, AliasEvent):
            return self._alias(event, depth)
        tag = getattr(event, "tag", None)
        if tag is not None:
            name = one_line(tag.replace("tag:yaml.org,2002:", "!!"), 40)
            raise self._fault(event, f"the tag {name} is not supported; write the value itself, text in quotes")
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self._anchors[anchor] = _OPEN
        if isinstance(event, ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, MappingStartEvent):
            value = self._mapping(depth)
        else:
            assert isinstance(event, SequenceStartEvent)
            value = self._sequence(depth)
        if anchor is not None:
            self._anchors[anchor] = value
        return value

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            items.append(self._value(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            key = self._value(event, depth + 1) if isinstance(event, ScalarEvent) else _OPEN
            if not isinstance(key, str):
                what = "a list or a mapping" if key is _OPEN else f"{shown(key)}, not text"
                raise self._fault(event, f"this key is {what}; put it in quotes")
            if key in lines:
                first = f"; it is first in line {lines[key]}" if self._locate else ""
                raise self._fault(event, f"duplicate key '{one_line(key, 60)}'{first}")
            lines[key] = _place(event)[0]
            following = next(self._events)
            value = self._value(following, depth + 1)
            if key == "<<" and isinstance(event, ScalarEvent) and event.implicit[0]:
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        raise self._fault(following, "<< needs the anchor of a mapping: <<: *name")
                    merged = part | merged
            else:
                own[key] = value
        return own if not merged else {**merged, **own}

    def _alias(self, event: AliasEvent, depth: int) -> Any:
        anchor = event.anchor or ""
        value, name = self._anchors.get(anchor, self), one_line(anchor, 40)
        if value is self:
            raise self._fault(event, f"*{name} has no anchor &{name} before it")
        if value is _OPEN:
            raise self._fault(event, f"*{name} is inside &{name} itself, so it would be infinite")
        return self._again(value, event, depth)

    def _again(self, value: Any, event: Event, depth: int) -> Any:
        """Copy an aliased value, so that overrides affect one use only; every copy counts toward the limits."""
        self._enter(event, depth, 1)
        if isinstance(value, dict):
            return {key: self._again(item, event, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._again(item, event, depth + 1) for item in value]
        return value

    def _enter(self, event: Event, depth: int, values: int) -> None:
        self._count += values
        if self._count > MOST_VALUES:
            raise self._fault(event, f"more than {MOST_VALUES:,} values, aliases included; a recipe has hundreds")
        if depth > DEEPEST:
            raise self._fault(event, f"nested more than {DEEPEST} deep")

    def _scalar(self, event: ScalarEvent) -> Any:
        text: str = event.value
        if not event.implicit[0]:
            if SURROGATE.search(text):
                raise self._fault(event, "half of a surrogate pair is not a character; write the character itself")
            return text
        try:
            return _plain_scalar(text)
        except ValueError as error:
            raise self._fault(event, str(error)) from None

    def _fault(self, event: Event, fault: str) -> DocumentError:
        line, column = _place(event)
        return DocumentError(f"{self._where}:{line}:{column}: {fault}" if self._locate else f"{self._where}: {fault}")


def _place(event: Event) -> tuple[int, int]:
    """Line and column, from 1."""
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)


def _plain_scalar(text: str) -> Any:
    """Parse an unquoted scalar. Raises ValueError for non-finite, too large or ambiguous numbers."""
    if text in _WORDS:
        return _WORDS[text]
    if _PADDED.fullmatch(text):
        plain = text.lstrip("+-0_") or "0"
        short = one_line(text, 40)
        raise ValueError(
            f"{short} is octal in YAML 1.1 and decimal in 1.2; write {one_line(plain, 40)}, or '{short}' for text"
        )
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if _WHOLE.fullmatch(text):
        digits = text.replace("_", "")
        if len(digits) <= 20 and abs(number := int(digits, 0)) <= LARGEST:
            return number
        raise ValueError(f"{one_line(text, 40)} is too large: the limit for integers is 2**53")
    if _FRACTION.fullmatch(text):
        fraction = float(text.replace("_", "")[:400])
        if not math.isfinite(fraction):
            raise ValueError(f"{one_line(text, 40)} is too large for a number")
        whole = "." not in text and fraction.is_integer() and abs(fraction) <= LARGEST
        return int(fraction) if whole else fraction
    return text
