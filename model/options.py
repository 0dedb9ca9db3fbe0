"""Base of a variant's `Options`: frozen, unknown keys refused with a suggestion, checked without a GPU."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from radlads.tasks.job import UserError


class MixerOptions(BaseModel):
    """What a user may choose about a variant. Every field has a default and a line that says what it does."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, variant: str) -> Self:
        """Validate `student.options` of a recipe. Raises UserError, one line per fault."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [f"student.options of {variant}: {cls._explain(fault)}" for fault in error.errors()]
            raise UserError("\n".join(lines)) from None

    def resolve(self, hidden_size: int) -> Self:
        """The same options with everything that depends on the teacher's width written out."""
        return self

    @classmethod
    def _explain(cls, fault: Any) -> str:
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = sorted(cls.model_fields)
            close = difflib.get_close_matches(place, known, n=1, cutoff=0.6)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
            return f"unknown key '{place}'{hint}"
        return f"{place}: {fault['msg'].removeprefix('Value error, ')} (given: {fault.get('input')!r})"
