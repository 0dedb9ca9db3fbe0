"""Request of `radlads chat` to the program that talks with models at a terminal, and what it shares with `serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from radlads.tasks.contracts.job import Sheet


class Talker(Sheet):
    """A model to talk to."""

    name: str
    """What its answers are headed with."""
    path: str
    """Folder, or hub id of a teacher."""
    is_student: bool
    revision: str | None = None


class Drawing(Sheet):
    """How answers are drawn; temperature 0 takes the likeliest token."""

    temperature: float = Field(default=0.7, ge=0, le=10)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0: all tokens."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10)
    max_new_tokens: int = Field(default=512, ge=1)
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    """None: every answer differs."""

    @field_validator("temperature")
    @classmethod
    def _divides_scores(cls, value: float) -> float:
        """Scores over less overflow, and then have no probabilities."""
        if 0 < value < 0.001:
            raise ValueError("must be 0, for the likeliest token, or at least 0.001")
        return value


class ModelsRequest(Sheet):
    """Models with one tokenizer, and how they are loaded."""

    talkers: tuple[Talker, ...] = Field(min_length=1)
    tokenizer: str
    """Folder or hub id."""
    revision: str | None = None
    """Of the tokenizer."""
    trust_remote_code: bool = False
    """Of the tokenizer."""
    chat_template: str | None = None
    """A template file, or template:NAME; None: the tokenizer's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class TalkRequest(ModelsRequest):
    """Talk with models, all of which read the same messages."""

    system: str | None = None
    sampling: Drawing = Drawing()
