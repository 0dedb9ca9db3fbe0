"""Base of every part of a recipe, the kinds of values that parts share, and the marks of what a digest is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

ReadsKind = Literal["files", "teacher", "tokenizer", "dataset", "task"]


@dataclass(frozen=True)
class Undigested:
    """Marks a field that no digest is made of."""

    why: str


OPERATIONAL = Undigested("it changes memory, speed or what is recorded on the way, not the result")
PLACE = Undigested("it says where something is; what is there is named beside it")


@dataclass(frozen=True)
class AddedLater:
    """Marks a field that is younger than products made without it: no digest is made of its default, which is what they
    were made with."""


@dataclass(frozen=True)
class Reads:
    """Marks a field that says where something is that a stage reads: a digest names what is there, never the place.

    kind: `files` are paths and globs of texts, `dataset` a hub id or folder for `datasets`, `task` the folder of a task
    of the evaluation harness (empty: one that the harness ships).
    """

    kind: ReadsKind


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _no_control_characters(text: str) -> str:
    if re.search("[\x00-\x1f\x7f]", text):
        raise ValueError("a place has no control characters, line breaks among them, in its name")
    return text


Place = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_control_characters)]
"""A path, a pattern of paths, or a hub id."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every generator of random numbers takes."""
Length = Annotated[int, Field(gt=0, le=2**22)]
"""Tokens of a document or a prompt that is built."""
