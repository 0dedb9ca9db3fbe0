"""The input of a digest: every field of a spec except the operational ones, with contents in place of places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from radlads.tasks.contracts.recipe.base import AddedLater, Reads, ReadsKind, Undigested


@dataclass(frozen=True)
class Reading:
    """A field that names a place to be read."""

    location: str
    """The field's path, dotted: `data.train.sources.0.paths`."""
    kind: ReadsKind
    place: tuple[str, ...]
    revision: str | None


class Pinned(Protocol):
    """A pin of the content at a place."""

    @property
    def named(self) -> Any:
        """The value that replaces the place in a digest."""


def readings(value: Any, prefix: str = "") -> Iterator[Reading]:
    """Every place that a model and its nested models name. prefix: dotted, prepended to each location."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            mark, item = _reads(field), getattr(value, name)
            if mark is None:
                yield from readings(item, f"{prefix}{name}.")
            elif (place := _place(item)) or mark.kind == "task":
                yield Reading(f"{prefix}{name}", mark.kind, place, getattr(value, "revision", None))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from readings(item, f"{prefix}{key}.")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from readings(item, f"{prefix}{index}.")


def identity(model: BaseModel, pins: Mapping[str, Pinned] | None) -> Any:
    """The JSON value of which the model's digest is computed.

    pins: location → content. None omits the places: for a spec made before any pin, or of a stage that reads none.
    Raises ValueError for a place that is not pinned.
    """
    return _identity(model, model.model_dump(mode="json"), pins, "")


def _identity(value: Any, dumped: Any, pins: Mapping[str, Pinned] | None, prefix: str) -> Any:
    if isinstance(value, BaseModel):
        kept = {}
        for name, field in type(value).model_fields.items():
            mark, item, location = _reads(field), getattr(value, name), f"{prefix}{name}"
            if any(isinstance(one, Undigested) and not one.unless(item) for one in field.metadata):
                continue
            later = next((one for one in field.metadata if isinstance(one, AddedLater)), None)
            if later is not None and item == (field.default if later.made_with is None else later.made_with):
                continue
            if mark is None:
                kept[name] = _identity(item, dumped[name], pins, f"{location}.")
            elif not _place(item) and mark.kind != "task":
                kept[name] = dumped[name]
            elif pins is not None:
                if location not in pins:
                    raise ValueError(f"{location} names a place whose content is not pinned")
                kept[name] = pins[location].named
        return kept
    if isinstance(value, Mapping):
        return {key: _identity(item, dumped[str(key)], pins, f"{prefix}{key}.") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [
            _identity(item, shown, pins, f"{prefix}{i}.")
            for i, (item, shown) in enumerate(zip(value, dumped, strict=True))
        ]
    return dumped


def _reads(field: FieldInfo) -> Reads | None:
    return next((mark for mark in field.metadata if isinstance(mark, Reads)), None)


def _place(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
