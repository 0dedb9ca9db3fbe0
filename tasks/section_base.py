"""Base of every part of a recipe, and the marks that say which keys a digest is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

ReadsKind = Literal["files", "teacher", "tokenizer", "dataset", "task"]


@dataclass(frozen=True)
class Undigested:
    """Marks a field that no digest is made of."""

    why: str


OPERATIONAL = Undigested("it changes memory, speed or what is recorded on the way, not the result")
PLACE = Undigested("it says where something is; what is there is named beside it")


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
