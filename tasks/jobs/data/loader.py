"""Tokens on disk → rows of tokens.

A dataset is a flat stream of tokens cut into shards of equal width. A row i of context c is tokens [i·c, i·c + c + 1):
rows overlap by one token, so that every token but the first is a label once. Which rows make which batch is said in
batch_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.dataset_index import DatasetIndex, SplitIndex
from radlads.tasks.jobs.strict_json import SheetError, read_sheet

# Mask values read at a time when a whole mask is read.
_READ_TOKENS = 1 << 24
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Batch = dict[str, torch.Tensor]
"""input_ids [B, context + 1] int64; loss_mask [B, context + 1] bool, if the dataset has masks; document_ids [B,
context + 1] int64, on request."""


class DatasetError(UserError):
    """The files of a dataset do not match its index."""


@dataclass(frozen=True)
class TokenSplit:
    """One split of a dataset: a flat stream of tokens, memory-mapped."""

    name: str
    folder: Path
    dtype: np.dtype[Any]
    shard_files: tuple[str, ...]
    shard_tokens: tuple[int, ...]
    mask_files: tuple[str, ...]
    boundaries_file: str | None
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text, for the bits-per-byte metric."""

    def rows(self, context: int) -> int:
        """Number of complete rows of this context length."""
        return max(0, (self.tokens - 1) // context)

    @cached_property
    def document_starts(self) -> np.ndarray[Any, Any]:
        """Stream offset of each document's first token, ascending, [documents]."""
        if self.boundaries_file is None:
            raise DatasetError(f"{self.folder}: the dataset has no document boundaries; tokenize it again")
        return np.memmap(self.folder / self.boundaries_file, dtype="<u8", mode="r")

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Tokens [start, stop) of the stream, [stop - start], in the dtype of the shards."""
        return self._read(self.shard_files, self.dtype, start, stop)

    def read_mask(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Whether each token of [start, stop) counts as a label, [stop - start] bool."""
        return self._read(self.mask_files, np.dtype(np.uint8), start, stop).astype(bool)

    def labels(self, context: int) -> np.ndarray[Any, Any]:
        """How many labels each whole row of this context has, [rows] int64: those that the masks count, or all."""
        count = self.rows(context)
        if not self.mask_files:
            return np.full(count, context, np.int64)
        labels = []
        size = max(1, _READ_TOKENS // context)
        for first in range(0, count, size):
            last = min(first + size, count)
            labels.append(self.read_mask(first * context + 1, last * context + 1).reshape(-1, context).sum(1))
        return np.concatenate(labels) if labels else np.zeros(0, np.int64)

    def batch(self, rows: np.ndarray[Any, Any] | list[int], context: int, *, document_ids: bool = False) -> Batch:
        """Read the given rows as one batch. Raises IndexError for a row that does not exist."""
        starts = np.asarray(rows, dtype=np.int64) * context
        width = context + 1
        batch = {"input_ids": torch.from_numpy(np.stack([self.read(s, s + width) for s in starts]).astype(np.int64))}
        if self.mask_files:
            batch["loss_mask"] = torch.from_numpy(np.stack([self.read_mask(s, s + width) for s in starts]))
        if document_ids:
            places = starts[:, None] + np.arange(width)
            batch["document_ids"] = torch.from_numpy(np.searchsorted(self.document_starts, places, side="right") - 1)
        return batch

    def heldout(
        self, context: int, batch_size: int, max_tokens: int, *, rank: int = 0, world_size: int = 1, **options: bool
    ) -> Iterator[Batch]:
        """This rank's share of the first rows of the split, up to max_tokens; at least one row over all ranks."""
        count = min(self.rows(context), max(1, max_tokens // context))
        mine = np.arange(rank, count, world_size)
        for start in range(0, len(mine), batch_size):
            yield self.batch(mine[start : start + batch_size], context, **options)

    def _read(self, files: tuple[str, ...], dtype: np.dtype[Any], start: int, stop: int) -> np.ndarray[Any, Any]:
        if not 0 <= start < stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a split that has {self.tokens}")
        width = self.shard_tokens[0]
        pieces = []
        while start < stop:
            shard, offset = divmod(start, width)
            # Open per read: one memory map per shard can exceed the process limit for a large corpus.
            count = min(stop - start, self.shard_tokens[shard] - offset)
            pieces.append(np.fromfile(self.folder / files[shard], dtype, count, offset=offset * dtype.itemsize))
            start += count
        return np.concatenate(pieces)


@dataclass(frozen=True)
class TokenDataset:
    """A verified dataset folder, returned by `open_dataset`."""

    folder: Path
    splits: dict[str, TokenSplit]
    vocab_size: int
    eos_id: int
    has_mask: bool
    tokenizer_fingerprint: str

    def split(self, name: str) -> TokenSplit:
        """`train` or `heldout`."""
        return self.splits[name]


def open_dataset(folder: Path) -> TokenDataset:
    """Read index.json and verify the size of every file. Raises DatasetError."""
    path = folder / "index.json"
    try:
        index = read_sheet(path, DatasetIndex)
        dtype = _DTYPES[index.dtype]
        splits = {name: _open_split(folder, name, dtype, entry) for name, entry in index.splits.items()}
        for name in ("train", "heldout"):
            splits[name]
        return TokenDataset(
            folder=folder,
            splits=splits,
            vocab_size=index.vocab_size,
            eos_id=index.eos_id,
            has_mask=index.has_mask,
            tokenizer_fingerprint=index.tokenizer_fingerprint,
        )
    except FileNotFoundError:
        raise DatasetError(f"{folder} is not a dataset: it has no index.json") from None
    except (SheetError, KeyError) as error:
        raise DatasetError(f"{path} is damaged or of another version ({error}); tokenize the dataset again") from None


def _open_split(folder: Path, name: str, dtype: np.dtype[Any], entry: SplitIndex) -> TokenSplit:
    files = tuple(shard.file for shard in entry.shards)
    counts = tuple(shard.tokens for shard in entry.shards)
    masks = entry.mask_files or ()
    boundaries = entry.boundaries_file
    for file, count in zip(files, counts, strict=True):
        _check_size(folder / file, count * dtype.itemsize)
    if masks:
        if len(masks) != len(files):
            raise DatasetError(f"{folder}: the {name} split has {len(files)} shards but {len(masks)} mask files")
        for file, count in zip(masks, counts, strict=True):
            _check_size(folder / file, count)
    if boundaries is not None:
        _check_size(folder / boundaries, entry.documents * 8)
    if sum(counts) != entry.tokens:
        raise DatasetError(
            f"{folder}: the {name} split has {entry.tokens} tokens in the index, but {sum(counts)} in its shards"
        )
    if any(count != counts[0] for count in counts[:-1]) or (counts and counts[-1] > counts[0]):
        raise DatasetError(f"{folder}: the shards of the {name} split are not of equal length")
    return TokenSplit(
        name=name,
        folder=folder,
        dtype=dtype,
        shard_files=files,
        shard_tokens=counts,
        mask_files=masks,
        boundaries_file=boundaries,
        tokens=entry.tokens,
        documents=entry.documents,
        bytes=entry.bytes,
    )


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        state = "is missing" if actual is None else f"has {actual} bytes"
        raise DatasetError(f"{path} {state}, expected {expected} bytes; delete the dataset and tokenize it again")
