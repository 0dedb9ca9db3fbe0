"""The schema of a dataset's index.json: the files of each split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from radlads.tasks.jobs.strict_json import Count, FileName, StrictSheet


class Shard(StrictSheet):
    """One file of the token stream."""

    file: FileName
    tokens: Count


class SplitIndex(StrictSheet):
    """The files of one split; see TokenSplit."""

    shards: tuple[Shard, ...] = Field(strict=False)
    mask_files: tuple[FileName, ...] | None = Field(default=(), strict=False)
    token_bytes_files: tuple[FileName, ...] | None = Field(default=(), strict=False)
    boundaries_file: FileName | None = None
    tokens: Count
    documents: Count
    bytes: Count


class DatasetIndex(StrictSheet):
    """The whole index."""

    dtype: Literal["uint16", "uint32"]
    eos_id: Count
    bos_id: Count | None = None
    add_bos: bool = False
    vocab_size: Count
    has_mask: bool
    tokenizer_fingerprint: str
    splits: dict[str, SplitIndex]
