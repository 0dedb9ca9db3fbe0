"""Writes encoded documents as the shards, boundaries and index of a dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.encode import Part

_FLUSH_TOKENS = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Format of a dataset on disk."""

    shard_tokens: int
    max_tokens: int | None
    seed: int
    eos_id: int
    bos_id: int | None
    add_bos: bool
    vocab_size: int
    tokenizer_fingerprint: str
    with_mask: bool

    @property
    def dtype(self) -> np.dtype:
        """uint16 if every id fits, else uint32; little endian."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one flat stream as files of `width` values; the last file may be shorter."""

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype, width: int) -> None:
        self.folder, self.prefix, self.dtype, self.width = folder, prefix, dtype, width
        self.total = 0
        self._buffer: list[np.ndarray] = []
        self._buffered = 0

    @property
    def position(self) -> int:
        """Values appended so far."""
        return self.total + self._buffered

    def append(self, values: np.ndarray) -> None:
        """Append values to the stream."""
        self._buffer.append(np.asarray(values).astype(self.dtype))
        self._buffered += len(values)
        if self._buffered >= _FLUSH_TOKENS:
            self._flush()

    def close(self) -> list[dict[str, Any]]:
        """Flush the buffer; returns [{file, tokens}, ...]."""
        self._flush()
        counts = [min(self.width, self.total - start) for start in range(0, self.total, self.width)]
        return [{"file": self._name(i), "tokens": count} for i, count in enumerate(counts)]

    def _name(self, index: int) -> str:
        return f"{self.prefix}-{index:05d}.bin"

    def _flush(self) -> None:
        values = np.concatenate(self._buffer) if self._buffer else np.zeros(0, self.dtype)
        self._buffer, self._buffered = [], 0
        while len(values):
            index, used = divmod(self.total, self.width)
            piece, values = values[: self.width - used], values[self.width - used :]
            with (self.folder / self._name(index)).open("ab") as stream:
                stream.write(piece.tobytes())
            self.total += len(piece)


class Written(Protocol):
    """Numbered documents, as they are written."""

    @property
    def count(self) -> int: ...

    @property
    def num_bytes(self) -> np.ndarray: ...

    def ids(self, number: int) -> np.ndarray: ...

    def mask(self, number: int) -> np.ndarray: ...

    def token_bytes(self, number: int) -> np.ndarray: ...


def write_dataset(corpus: Part, folder: Path, layout: Layout) -> dict[str, Any]:
    """As write_documents, of the documents in reading order up to max_tokens, shuffled with the seed."""
    documents = Documents(corpus, layout.max_tokens)
    order = np.random.Generator(np.random.PCG64(layout.seed)).permutation(documents.count)
    return write_documents(documents, order, documents.heldout_or_smallest(), folder, layout)


def write_documents(
    documents: Written, order: np.ndarray, heldout: np.ndarray, folder: Path, layout: Layout
) -> dict[str, Any]:
    """Write shards, boundaries and index.json into an empty folder; returns the index.

    order: numbers of documents. heldout: flag of each document. Raises UserError if the training or the held-out split
    would be empty.
    """
    splits: dict[str, Any] = {}
    for split, prefix, chosen in (
        ("train", "", order[~heldout[order]]),
        ("heldout", "heldout-", order[heldout[order]]),
    ):
        if not len(chosen):
            raise UserError(
                f"the {split} split would be empty: {documents.count} documents; add documents (a text file needs "
                f"`separator` to hold several), or change heldout_fraction"
            )
        splits[split] = _write_split(documents, chosen, folder, layout, split, prefix)
    index = {
        "dtype": layout.dtype.name,
        "eos_id": layout.eos_id,
        "bos_id": layout.bos_id,
        "add_bos": layout.add_bos,
        "vocab_size": layout.vocab_size,
        "has_mask": layout.with_mask,
        "shard_tokens": layout.shard_tokens,
        "tokenizer_fingerprint": layout.tokenizer_fingerprint,
        "splits": splits,
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return index


def _write_split(
    documents: Written, chosen: np.ndarray, folder: Path, layout: Layout, split: str, prefix: str
) -> dict[str, Any]:
    # File names: shard-00000.bin and mask-00000.bin for training, heldout-00000.bin and heldout-mask-00000.bin.
    tokens = ShardWriter(folder, "heldout" if prefix else "shard", layout.dtype, layout.shard_tokens)
    masks = ShardWriter(folder, f"{prefix}mask", np.dtype("u1"), layout.shard_tokens)
    sizes = ShardWriter(folder, f"{prefix}token-bytes", np.dtype("<u4"), layout.shard_tokens)
    starts = np.zeros(len(chosen), "<u8")
    for position, document in enumerate(chosen):
        starts[position] = tokens.position
        tokens.append(documents.ids(document))
        if layout.with_mask:
            masks.append(documents.mask(document))
        if prefix:
            sizes.append(documents.token_bytes(document))
    boundaries = f"{split}-boundaries.bin"
    (folder / boundaries).write_bytes(starts.tobytes())
    shards = tokens.close()
    return {
        "shards": shards,
        "mask_files": [shard["file"] for shard in masks.close()],
        "token_bytes_files": [shard["file"] for shard in sizes.close()],
        "tokens": tokens.total,
        "documents": len(chosen),
        "bytes": int(documents.num_bytes[chosen].sum()),
        "boundaries_file": boundaries,
    }


class Documents:
    """The documents of a corpus in reading order, truncated at max_tokens, or after `count` of them."""

    def __init__(self, corpus: Part, max_tokens: int | None, count: int | None = None) -> None:
        self.corpus = corpus
        lengths, heldout = np.asarray(corpus.lengths), np.asarray(corpus.heldout)
        self.count = len(lengths) if count is None else count
        if max_tokens is not None:
            self.count = int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right"))
            if self.count == 0:
                raise UserError(f"max_tokens ({max_tokens}) is smaller than the first document ({lengths[0]} tokens)")
        self.lengths = lengths[: self.count]
        self.heldout = heldout[: self.count]
        self.starts = _starts(self.lengths)
        # token_bytes covers held-out documents only, so it has its own offsets.
        self.byte_starts = _starts(self.lengths * self.heldout)
        self.num_bytes = np.asarray(corpus.num_bytes)[: self.count]
        self.hashes = np.asarray(corpus.hashes)[: self.count]

    def heldout_or_smallest(self) -> np.ndarray:
        """Held-out flags, [documents]; if the hash selected none, the document with the smallest hash."""
        if self.heldout.any() or self.count < 2:
            return self.heldout
        smallest: np.ndarray = self.hashes == self.hashes.min()
        return smallest

    def ids(self, document: int) -> np.ndarray:
        return self._slice(self.corpus.ids, self.starts[document], document)

    def mask(self, document: int) -> np.ndarray:
        return self._slice(self.corpus.mask, self.starts[document], document)

    def token_bytes(self, document: int) -> np.ndarray:
        if not self.heldout[document]:  # selected by heldout_or_smallest: distribute its bytes evenly
            ends = np.arange(1, self.lengths[document] + 1) * self.num_bytes[document] // self.lengths[document]
            return np.diff(ends, prepend=0)
        return self._slice(self.corpus.token_bytes, self.byte_starts[document], document)

    def _slice(self, values: np.ndarray, start: int, document: int) -> np.ndarray:
        return np.asarray(values[start : start + self.lengths[document]])


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(lengths) - lengths
    return starts
