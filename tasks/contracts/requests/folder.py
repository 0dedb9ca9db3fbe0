"""Requests of `radlads export` to the programs that write a student anew: as a folder, as one GGUF file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from radlads.tasks.contracts.job import Sheet


class FolderExport(Sheet):
    """Write an exported student with weights of another type, or in other shards."""

    student: str
    """Its folder, as a run published it; the card and other files go along."""
    out: str
    """A folder that does not exist yet."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the weights; None: as they are."""
    max_shard_bytes: int | None = Field(default=None, ge=1)
    """Largest file of weights; None: as they are."""
    trust_remote_code: bool = False
    """Of the tokenizer."""


class GgufExport(Sheet):
    """Write an exported student as one file for llama.cpp."""

    student: str
    """Its folder."""
    out: str
    """A file that does not exist yet."""
    name: str = Field(min_length=1, max_length=200)
    """What the file calls the model where it has no card."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of matrices; None: as they are."""
    trust_remote_code: bool = False
    """Of the tokenizer."""
