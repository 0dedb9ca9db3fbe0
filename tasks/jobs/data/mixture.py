"""Mixtures: which documents of several sources a dataset has, and in which order, so that tokens follow the weights.

The next document comes from the source whose training tokens are furthest below its share. So after any number of
documents, a source has its share of the training tokens up to the longest document of each source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from radlads.tasks.jobs.data.encode import Part
from radlads.tasks.jobs.data.shards import Documents


@dataclass(frozen=True)
class Mixture:
    """Documents of several sources, in order; has what `write_documents` reads of `Documents`."""

    sources: Sequence[Documents]
    source: np.ndarray
    """Of each document, [N]."""
    document: np.ndarray
    """Its index in its source, [N]."""
    heldout: np.ndarray
    """Whether it is held out, [N]; no held-out text occurs twice."""
    passes: tuple[float, ...]
    """How often each source's training tokens were read; above 1 are repeats."""
    ended: int | None
    """The source that had no more documents; None if the limit of tokens was reached before."""
    turn: int
    """The source whose turn it was at the end."""

    @property
    def count(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Training tokens of each source."""
        lengths, train = self._of_each("lengths"), ~self.heldout
        return tuple(int(lengths[train & (self.source == index)].sum()) for index in range(len(self.sources)))

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return int(self._of_each("lengths").sum())

    @property
    def num_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document, [N]."""
        return self._of_each("num_bytes")

    def ids(self, number: int) -> np.ndarray:
        found: np.ndarray = self.sources[self.source[number]].ids(self.document[number])
        return found

    def mask(self, number: int) -> np.ndarray:
        found: np.ndarray = self.sources[self.source[number]].mask(self.document[number])
        return found

    def token_bytes(self, number: int) -> np.ndarray:
        found: np.ndarray = self.sources[self.source[number]].token_bytes(self.document[number])
        return found

    def _of_each(self, name: str) -> np.ndarray:
        values = np.zeros(self.count, np.int64)
        for index, source in enumerate(self.sources):
            here = self.source == index
            values[here] = getattr(source, name)[self.document[here]]
        return values


def mix(
    parts: Sequence[Part], shares: Sequence[float], repeats: Sequence[int], *, max_tokens: int | None, seed: int
) -> Mixture:
    """The mixture of some sources, each given by its encoded documents, until one has no more or max_tokens is reached.

    shares: of the training tokens, above 0. repeats: how often a source may be read, at most; each time in another
    order, which follows from the seed. A function of its arguments, and independent of how the sources were encoded
    beyond what is needed.
    """
    sources = [
        Documents(part, None, _needed(part, None if max_tokens is None else share * max_tokens))
        for part, share in zip(parts, shares, strict=True)
    ]
    readings = [_documents(s, repeats[index], (seed, index)) for index, s in enumerate(sources)]
    train = [0] * len(sources)
    picked: list[tuple[int, int]] = []
    total, ended = 0, None
    while True:
        index = min(range(len(sources)), key=lambda i: (train[i] / shares[i], i))
        document = next(readings[index], None)
        if document is None:
            ended = index
            break
        length = int(sources[index].lengths[document])
        if max_tokens is not None and total + length > max_tokens:
            break
        picked.append((index, document))
        total += length
        train[index] += 0 if sources[index].heldout[document] else length
    source, document_N = (np.array([pair[side] for pair in picked], np.int64) for side in (0, 1))
    heldout, kept = _split(sources, source, document_N)
    own = [int(s.lengths[~s.heldout].sum()) for s in sources]
    passes = tuple(read / max(1, have) for read, have in zip(train, own, strict=True))
    return Mixture(sources, source[kept], document_N[kept], heldout[kept], passes, ended, index)


def _needed(part: Part, train_tokens: float | None) -> int:
    """The number of a source's documents, in reading order, that hold more training tokens than these."""
    lengths = np.asarray(part.lengths) * ~np.asarray(part.heldout)
    if train_tokens is None:
        return len(lengths)
    return min(len(lengths), int(np.searchsorted(np.cumsum(lengths), train_tokens, side="right")) + 1)


def _documents(source: Documents, repeats: int, seed: tuple[int, int]) -> Iterator[int]:
    """Documents in a random order, the held-out ones only the first time."""
    for reading in range(repeats):
        order = np.random.Generator(np.random.PCG64((*seed, reading))).permutation(source.count)
        yield from (int(document) for document in order if reading == 0 or not source.heldout[document])


def _split(sources: Sequence[Documents], source: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(held-out, kept) flags: if the hash selected no document, the one with the smallest hash is held out, once."""
    heldout, hashes = np.zeros(len(source), np.bool_), np.zeros(len(source), np.uint64)
    for index, documents in enumerate(sources):
        here = source == index
        heldout[here], hashes[here] = documents.heldout[document[here]], documents.hashes[document[here]]
    kept = np.ones(len(source), np.bool_)
    if not heldout.any() and len(source) > 1:
        heldout = hashes == hashes.min()
        kept[np.flatnonzero(heldout)[1:]] = False
    return heldout, kept
