"""Strict reading of the project's own JSON files, with a one-line message for what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_LONGEST_BYTES = 64 << 20
_SHOWN = 120
_Sheet = TypeVar("_Sheet", bound="StrictSheet")

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]
"""Name of a file in the same folder; never a path."""
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class StrictSheet(BaseModel):
    """Base of such a file's model: no type conversions; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


class SheetError(ValueError):
    """The faults of a file in one line."""


def read_sheet(path: Path, kind: type[_Sheet]) -> _Sheet:
    """Raises FileNotFoundError, SheetError."""
    size = path.stat().st_size
    if size > _LONGEST_BYTES:
        raise SheetError(f"it is {size:,} bytes long")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        told = f"{place[:_SHOWN]}: {first['msg']}" if place else str(first["msg"])
        raise SheetError(re.sub(r"[^\x20-\x7e]", "?", told)) from None
