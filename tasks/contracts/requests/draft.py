"""What `radlads init` asks of the program that drafts a recipe, and what it gets back."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from radlads.tasks.contracts.job import Sheet


class DraftRequest(Sheet):
    """Draft a recipe for a teacher and a machine. name: of the recipe. command: as it was typed, for the recipe's first
    line. budget: in dollars. data: files, folders or hub ids of text; empty: a public set. out: file of the Draft."""

    teacher: str
    name: str
    command: str
    hybrid: bool
    budget: float | None = Field(default=None, gt=0)
    effort: str | None = None
    """Name of the effort to take; None: by the budget, or the usual one."""
    data: tuple[str, ...] = ()
    gpus: int = Field(ge=0, le=4096)
    """0: a CPU."""
    gpu: str = ""
    """Kind of the GPUs, by its short name; "": not known."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Of each; None: as its kind has."""
    price: float | None = Field(default=None, ge=0)
    """Dollars an hour and GPU; None: what its kind may cost."""
    out: str


class Offer(Sheet):
    """A way to convert this teacher: what it takes on the machine, and what it does not give. tokens: of all training.
    fault: why it cannot be taken there; the rest is then not known."""

    name: str
    tokens: int
    words: str
    """What it is, with its source."""
    loses: str = ""
    """Compared with the next larger one, with the source."""
    gpu_hours: float | None = None
    seconds: float | None = None
    dollars: float | None = None
    fault: str = ""


class Draft(Sheet):
    """text: of the recipe, as YAML. facts, notes: a line each. offers: the cheapest first; chosen: the name of one."""

    text: str
    facts: tuple[str, ...]
    notes: tuple[str, ...] = ()
    offers: tuple[Offer, ...]
    chosen: str
    kind: Literal["hybrid", "pure"]
