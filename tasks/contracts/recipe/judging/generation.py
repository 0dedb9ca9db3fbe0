"""`evaluate.generation` and `evaluate.speed`: what teacher and student write, how they obey, and how fast they are."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import Length, Place, Reads, Section, Seed

Temperature = Annotated[float, Field(ge=0.05, le=10)]


class EvalInstructions(Section):
    """Questions with constraints that a program can check exactly; greedy answers in the tokenizer's chat template."""

    paths: Annotated[tuple[Place, ...], Reads("files")] = Field(min_length=1)
    """jsonl files (also compressed). A row has a `prompt` and its `constraints` (docs/evaluation.md), or `messages`: a
    chat, to whose first user message one or two constraints are added. No training stage should read these chats."""
    messages_field: str = "messages"
    """The field with the messages of a chat."""
    questions: int = Field(default=200, ge=2)
    """At most, from the beginning of the files."""
    max_characters: int = Field(default=1000, gt=0)
    """Chats whose first user message is longer are left out."""
    new_tokens: int = Field(default=256, gt=0)
    """Of an answer, at most."""
    seed: Seed = 1234
    """Of the constraints that are added."""

    @property
    def longest(self) -> int:
        """About the tokens of the longest question with its answer, at four characters a token."""
        return self.max_characters // 4 + self.new_tokens


class EvalGeneration(Section):
    """Text that teacher and student write to the same prompts, judged by the teacher and by its repetitions."""

    prompts: Annotated[tuple[Place, ...], Reads("files")] = ()
    """Files (as in `files`) whose documents' beginnings are continued, in turn; empty: BOS alone."""
    prompts_separator: str | None = Field(default=None, min_length=1)
    """Text files only: the separator between documents."""
    text_field: str = "text"
    """The field with a document's text."""
    prompt_tokens: int = Field(default=32, gt=0)
    """Tokens of a document's beginning that are given to the models."""
    samples: int = Field(default=128, ge=2, le=100_000)
    """Of each model at each temperature."""
    new_tokens: int = Field(default=256, ge=16)
    """Of a sample, at most."""
    temperatures: tuple[Temperature, ...] = Field(default=(0.7, 1.0), min_length=1)
    """Each is sampled by itself."""
    seed: Seed = 1234
    """Of the noise that sampling adds; both models get the same."""
    instructions: EvalInstructions | None = None
    """Questions whose answers a program checks. Source: after IFEval (2311.07911)."""

    @model_validator(mode="after")
    def _temperatures_differ(self) -> Self:
        if len({f"{one:g}" for one in self.temperatures}) < len(self.temperatures):
            raise ValueError("temperatures has a temperature twice")
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest sample with its prompt, BOS included."""
        return (self.prompt_tokens if self.prompts else 0) + 1 + self.new_tokens

    @property
    def longest_row(self) -> int:
        """About the tokens of the longest row, questions included."""
        return max(self.longest, 0 if self.instructions is None else self.instructions.longest)


class EvalSpeed(Section):
    """Time and memory of teacher and student, each alone on one device."""

    lengths: tuple[Length, ...] = Field(default=(1024, 4096, 16384), min_length=1)
    """Of the prompts that are read, in tokens."""
    new_tokens: int = Field(default=64, gt=0)
    """Generated after each prompt, for the speed of decoding."""
    batch: int = Field(default=1, gt=0)
    """Prompts at once."""

    @model_validator(mode="after")
    def _lengths_differ(self) -> Self:
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError("lengths has a length twice")
        return self
