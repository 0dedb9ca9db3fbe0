"""Base of every part of a recipe, and the kinds of values that many parts share."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


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
