"""Base of a variant's `Options`: frozen, unknown keys refused with a suggestion, checked without a GPU."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from radlads.model.mixers.shared.mixer import low_rank_size
from radlads.tasks.contracts.errors import UserError

_LARGEST = 1 << 16


class _InitialValue:
    """Type of `INITIAL`."""


INITIAL = _InitialValue()
"""Marks an option for initial values (`Annotated[float, INITIAL]`): read when a mixer is initialised, never when one is
loaded, so it may be changed, added or removed without affecting earlier exports."""


class Rank(NamedTuple):
    """A published rank: max(floor, max(1, round(width^exponent · scale / 32)) · 32), rounding half to even."""

    exponent: float
    scale: float
    floor: int = 32


class MixerOptions(BaseModel):
    """Options of a variant. Every field has a default and a one-line description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    RANKS: ClassVar[Mapping[str, Rank]] = {}
    """Formula of every field that is a rank, used where the field is None."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, variant: str) -> Self:
        """Validate `student.options` of a recipe. Raises UserError, one line per fault."""
        try:
            options = cls.model_validate(dict(values))
        except ValidationError as error:
            lines = [f"student.options of {variant}: {cls._explain(fault)}" for fault in error.errors()]
            raise UserError("\n".join(lines)) from None
        for name, value in options:
            if isinstance(value, int) and value > _LARGEST:
                raise UserError(f"student.options of {variant}: {name} is {value}; at most {_LARGEST:,} can be built")
        return options

    def resolve(self, hidden_size: int, width: int) -> Self:
        """The same options with all values that depend on the teacher's sizes filled in.

        hidden_size: D. width: A, that of all query heads together, from which ranks follow unless a variant says D.
        """
        return self.with_ranks(width)

    def with_ranks(self, width: int) -> Self:
        """Compute every rank that is None from its formula."""
        ranks = {
            name: max(rank.floor, low_rank_size(width, rank.exponent, rank.scale))
            for name, rank in self.RANKS.items()
            if getattr(self, name) is None
        }
        return self.model_copy(update=ranks)

    @classmethod
    def initial_names(cls) -> set[str]:
        """Options that only set initial values; see `INITIAL`."""
        return {name for name, field in cls.model_fields.items() if INITIAL in field.metadata}

    def split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`(options that define inference, initial values)` as plain values, for a student's config."""
        initial = self.initial_names()
        return self.model_dump(mode="json", exclude=initial), self.model_dump(mode="json", include=initial)

    @classmethod
    def _explain(cls, fault: Any) -> str:
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = sorted(cls.model_fields)
            close = difflib.get_close_matches(place, known, n=1, cutoff=0.6)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
            return f"unknown key '{place}'{hint}"
        return f"{place}: {fault['msg'].removeprefix('Value error, ')} (given: {repr(fault.get('input'))[:80]})"


class Rwkv7Options(MixerOptions):
    """Options of every variant of the RWKV-7 family. A rank of None is the published formula."""

    decay_rank: int | None = Field(default=None, ge=1)
    iclr_rank: int | None = Field(default=None, ge=1)
    decay_shift: Annotated[float, INITIAL] = 0.0
    """Added to w0, whose published initial decay is slow. Positive: faster decay at first."""


STOCK_RANKS = {
    "decay_rank": Rank(0.5, 1.8),
    "iclr_rank": Rank(0.5, 1.8),
    "value_rank": Rank(0.5, 1.3),
    "gate_rank": Rank(0.8, 0.6),
}
"""The official RWKV-7 code's."""


class StockOptions(Rwkv7Options):
    """Options of variants with RWKV-7's own keys and first-layer values."""

    rope: bool = False
    """Published: no rotary positions. True: on r and k, before the repeat; the teacher's own frequencies."""
    first_values_gradient: bool = True
    """False: deeper layers do not train the first one through v_first, as in the published OpenMOSE runs."""
    value_residual_init: Annotated[float, INITIAL] = 1.0
    """v0. Published: 1, which starts every layer with 73 % of its values from the first layer; -4 starts with 2 %."""
    value_rank: int | None = Field(default=None, ge=1)


class HxaOptions(Rwkv7Options):
    """Options of hxa079 and its successors."""

    rope: bool = True
    """Rotary positions on r and k, before the repeat; the teacher's own frequencies."""
    gate_init: Annotated[Literal["published", "identity"], INITIAL] = "published"
    """published: a small random signed gate. identity: the same parameters, started so that the gate is 1."""
    gate_rank: int | None = Field(default=None, ge=1)
