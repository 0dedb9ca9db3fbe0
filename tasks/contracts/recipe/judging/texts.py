"""`evaluate.texts`: texts beside the held-out ones, such as WikiText-2's test set."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from radlads.tasks.contracts.recipe.base import Place, Reads, Section


class EvalText(Section):
    """A text that teacher and final student are scored on, every token of it: bits per byte, their ratio, and KL."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=40)
    """In the names of its numbers."""
    paths: Annotated[tuple[Place, ...], Reads("files")] = Field(min_length=1)
    """Files, as in a `files` source."""
    separator: str | None = Field(default=None, min_length=1)
    """Text files only: the separator between documents. None: each file is one document."""
    text_field: str = "text"
    """The field with a document's text."""
    context: int = Field(default=2048, gt=1)
    """Windows follow one another; a token sees those before it in its window."""
