"""Types and values of recipe keys in words, as a page for people has them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from radlads.tasks.contracts.recipe.base import Section

_WORDS = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", type(None): "null", Any: "any"}
_SIGNS = ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt"))


def type_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words, with its limits: `integer > 0`, `list of text`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [one for mark in inner[1:] for one in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return type_words(inner[0], [*own, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(one, metadata) for one in inner))
    if origin is Literal:
        words = [f"`{yaml_words(value)}`" for value in inner]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is tuple:
        return f"list of {type_words(inner[0])}"
    if origin is dict:
        return f"mapping of names to {type_words(inner[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return "section"
    limits = [
        f"{sign} {number_words(getattr(m, at))}" for kind, sign, at in _SIGNS for m in metadata if type(m) is kind
    ]
    return f"{_WORDS[annotation]} {', '.join(limits)}" if limits and annotation in (int, float) else _WORDS[annotation]


def default_words(field: FieldInfo) -> str:
    """A field's default as a recipe writes it; "" for a section whose own defaults it has."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, Section) and not yaml_words(value).strip("{}") else f"`{yaml_words(value)}`"


def yaml_words(value: Any) -> str:
    """A value as a recipe writes it; of a section, what is not its default."""
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        value = {name: one for name, one in value if one != _default(value, name)}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {yaml_words(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_words, value)) + "]"
    return number_words(value) if isinstance(value, int | float) else str(value) or '""'


def number_words(value: float) -> str:
    """A number as a recipe writes it: 4_000_000, 0.001, 1.0e-5."""
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    digits, _, exponent = f"{value:g}".partition("e")
    if not exponent:
        return digits
    return f"{digits if '.' in digits else digits + '.0'}e{int(exponent)}"  # YAML reads 1e-05 as a text


def _default(section: Section, name: str) -> Any:
    field = type(section).model_fields[name]
    return field if field.is_required() else field.get_default(call_default_factory=True)
