"""The recipe's section `needle`: retrieval from long texts by generation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from radlads.tasks.contracts.recipe.base import OPERATIONAL, AddedLater, Length, Place, Reads, Section, Seed
from radlads.tasks.contracts.recipe.judging.ruler import Ruler


class Needle(Section):
    """Needle in a haystack: retrieval of a fact at a given depth, by greedy generation and string match."""

    lengths: tuple[Length, ...] = Field(default=(256, 512, 1024), min_length=1)
    """Prompt lengths in tokens, including the question."""
    depths: tuple[float, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    """Where the fact is hidden: 0 is the beginning of the text, 1 its end."""
    trials: int = Field(default=5, ge=5)
    """Prompts of each length and depth."""
    batch: Annotated[int | None, OPERATIONAL] = Field(default=None, gt=0)
    """Rows at once; None: as many as fit, by their length."""
    max_new_tokens: int = Field(default=16, gt=0)
    """Of an answer."""
    training_length: int | None = Field(default=None, gt=0)
    """Training length in tokens, drawn as a dashed line; None: the longest context of the training stages."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    """Files (as in `files`) with the text that hides facts; empty: the built-in filler."""
    haystack_separator: str | None = None
    """As `separator` of `files`, for the haystack."""
    chat_template: bool = False
    """Put the prompt into a user message with the tokenizer's chat template, whose tokens are added to the length."""
    add_bos: bool | None = None
    """Prepend BOS to the prompts. None: the tokenizer's default."""
    seed: Seed = 1234
    """Of facts and prompts."""
    ruler: Annotated[Ruler | None, AddedLater()] = None
    """RULER's tasks beside the needles; null: none. Source: 2404.06654."""

    @property
    def longest(self) -> int:
        """The longest prompt, in tokens, RULER's included."""
        return max(*self.lengths, *(() if self.ruler is None else self.ruler.lengths), 0)
