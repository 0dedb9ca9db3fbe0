"""Tensors of a GGUF file as they come out of a student's weight files: renamed, turned, repeated, in blocks of rows.

Shapes are torch's, [rows, columns]; GGUF lists them the other way round. Dims: D model width, R low rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from radlads.model.weights.weight_files import WeightFiles

_BLOCK_VALUES = 1 << 24
"""Values that are held at a time of a tensor that is copied row by row."""


@dataclass(frozen=True)
class Piece:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    wide: bool
    """Always fp32: vectors and low-rank factors, which cost little; others have the file's type."""
    blocks: Callable[[], Iterator[Tensor]]
    """Its values, in any float type, in parts along the first axis."""
    sources: tuple[str, ...] = ()
    """Names of the student's tensors that it is made of."""


class Source:
    """Makes pieces out of a student's weight files. Tensors are read when a piece's blocks are asked for."""

    def __init__(self, files: WeightFiles) -> None:
        self.files = files

    def matrix(self, name: str, source: str, start: int = 0, stop: int | None = None) -> Piece:
        """Rows `start` to `stop` of a matrix, as they are."""
        rows, columns = self.files.shape(source)
        stop = rows if stop is None else stop
        step = max(1, _BLOCK_VALUES // columns)

        def blocks() -> Iterator[Tensor]:
            for at in range(start, stop, step):
                yield self.files.read(source, at, min(at + step, stop))

        return Piece(name, (stop - start, columns), False, blocks, (source,))

    def repeated(self, name: str, source: str, head_dim: int, repeats: int, *, wide: bool = False) -> Piece:
        """A matrix or a vector whose heads (groups of `head_dim` rows) each occur `repeats` times in a row."""
        rows, *rest = self.files.shape(source)

        def blocks() -> Iterator[Tensor]:
            for at in range(0, rows, head_dim):
                head = self.files.read(source, at, at + head_dim)
                yield from [head] * repeats

        return Piece(name, (rows * repeats, *rest), wide, blocks, (source,))

    def vector(self, name: str, source: str) -> Piece:
        """Any tensor as a vector, in fp32."""
        return self.made(name, (math.prod(self.files.shape(source)),), lambda x: x.flatten(), source)

    def turned(self, name: str, source: str, *, wide: bool = True) -> Piece:
        """A low-rank factor [in, out] as the rows that a product takes, [out, in]."""
        into, out = self.files.shape(source)
        return self.made(name, (out, into), lambda x: x.T, source, wide=wide)

    def made(
        self, name: str, shape: tuple[int, ...], make: Callable[..., Tensor], *sources: str, wide: bool = True
    ) -> Piece:
        """What `make` gives of the tensors `sources`, which are read whole."""

        def blocks() -> Iterator[Tensor]:
            yield make(*(self.files.read(source) for source in sources)).reshape(shape)

        return Piece(name, shape, wide, blocks, sources)

    @staticmethod
    def zeros(name: str, *shape: int, wide: bool = True) -> Piece:
        """What switches a term of a graph off."""

        def blocks() -> Iterator[Tensor]:
            for _ in range(shape[0]):
                yield torch.zeros(1, *shape[1:])

        return Piece(name, shape, wide, blocks)
