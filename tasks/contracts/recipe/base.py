"""Base class of recipe sections, shared value types, and markers that control what enters a digest."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

_SMALLEST, _LARGEST = 1e-30, 1e9
ReadsKind = Literal["files", "teacher", "tokenizer", "dataset", "task"]


@dataclass(frozen=True)
class Undigested:
    """Marks a field that does not enter any digest, `unless` its value has an effect on the result."""

    why: str
    unless: Callable[[Any], bool] = lambda _: False


OPERATIONAL = Undigested("it changes memory, speed or what is recorded, not the result")
PLACE = Undigested("it is a location; the content at it is pinned separately")


@dataclass(frozen=True)
class AddedLater:
    """Marks a field that is younger than products made without it: no digest is made of what they were made with, which
    is its default or, where the default is another one since then, `made_with`."""

    made_with: Any = None


@dataclass(frozen=True)
class Reads:
    """Marks a field with the location of stage input: its content enters the digest, the location does not.

    kind: `files` are paths and globs of text files, `dataset` a hub id or folder for `datasets`, `task` the folder of
    an evaluation-harness task (empty: a task that the harness ships).
    """

    kind: ReadsKind


class Section(BaseModel):
    """Base class of recipe sections: frozen, unknown keys rejected, numbers such as training in float32 can use."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits_float32(cls, value: Any) -> Any:
        if isinstance(value, float) and value != 0 and not _SMALLEST <= abs(value) <= _LARGEST:
            raise ValueError(f"a number from {_SMALLEST:g} to {_LARGEST:g} is needed: float32 cannot compute with this")
        return value


def _no_control_characters(text: str) -> str:
    if re.search("[\x00-\x1f\x7f]", text):
        raise ValueError("a location must not contain control characters or line breaks")
    return text


Place = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_control_characters)]
"""A path, a pattern of paths, or a hub id."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that every random generator accepts."""
Length = Annotated[int, Field(gt=0, le=2**22)]
"""Length of a generated document or prompt, in tokens."""
