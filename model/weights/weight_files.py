"""Read and write safetensors one tensor at a time, so that 72B parameters need little memory.

Which files are a checkpoint's: checkpoint_files.py. The format: safetensors_header.py.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from radlads.model.weights.checkpoint_files import INDEX, SINGLE, read_headers
from radlads.model.weights.safetensors_header import TensorEntry
from radlads.tasks.contracts.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightFiles:
    """The tensors of a checkpoint's safetensors files, by their names in the files."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        """entries: as `read_headers` finds them."""
        self._entries = dict(entries)
        self._mapped: dict[Path, mmap.mmap] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def paths(self) -> list[Path]:
        """The files, each once."""
        return list(dict.fromkeys(entry.path for entry in self._entries.values()))

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def stored_dtype(self, name: str) -> str:
        """The format's name: F32, BF16, I8, ..."""
        return self._entries[name].dtype

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for a number format that is not supported for weights (F4, F8_E8M0, ...)."""
        dtype = self._entries[name].dtype
        if dtype not in _DTYPES:
            raise UserError(f"tensor {name} of {self._entries[name].path} is {dtype}, which is not read")
        return _DTYPES[dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor in memory of its own; start, stop: only these rows of its first axis are read."""
        entry, dtype = self._entries[name], self.dtype(name)
        shape, offset = entry.shape, entry.offset
        if shape:
            stop = shape[0] if stop is None else stop
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            offset, shape = entry.offset + start * row_bytes, (stop - start, *shape[1:])
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        try:
            with entry.path.open("rb") as stream:
                stream.seek(offset)
                count = stream.readinto(memoryview(raw.numpy()))
        except OSError as error:
            raise UserError(f"cannot read tensor {name} of {entry.path}: {error.strerror}") from error
        if count != raw.numel():
            raise UserError(f"{entry.path} ends within '{name}'; download it again")
        return raw.view(dtype).view(shape)

    def map(self, name: str) -> Tensor:
        """A tensor mapped from the file (copy on write), for a model that stays in memory: ranks of a machine share the
        pages. A tensor that cannot be mapped is read."""
        entry, dtype = self._entries[name], self.dtype(name)
        count = math.prod(entry.shape)
        if count == 0 or entry.offset % dtype.itemsize:
            return self.read(name)
        try:
            if entry.path not in self._mapped:
                with entry.path.open("rb") as stream:
                    self._mapped[entry.path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read tensor {name} of {entry.path}: {error}") from error
        flat = torch.frombuffer(self._mapped[entry.path], dtype=dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)


def open_weight_files(path: str, *, revision: str | None = None, download: bool = True) -> WeightFiles:
    """The safetensors files of a folder or hub id, their headers read and checked. Raises UserError: see
    `read_headers`. download: False gives sizes only; tensors of a hub id cannot be read then."""
    return WeightFiles(read_headers(path, revision=revision, download=download))


class WeightWriter:
    """Writes a model's tensors in the given order as one safetensors file, or several with an index.

    A file gets its final name only when it is complete, and the index is written last, so that the partial output of a
    killed job is never taken for a model.
    """

    def __init__(
        self, folder: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], *, max_shard_bytes: int
    ) -> None:
        """layout: name → dtype and shape, in the order in which `write` will be called."""
        self._folder = folder
        self._layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}
        self._shards: list[list[str]] = []
        room = 0
        for name in self._layout:
            size = self._size(name)
            if not self._shards or size > room:
                self._shards.append([])
                room = max_shard_bytes
            self._shards[-1].append(name)
            room -= size
        self._order = [(shard, name) for shard, names in enumerate(self._shards) for name in names]
        self._done = 0
        self._stream: BinaryIO | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.safetensors", "*.safetensors.index.json", "*.safetensors.partial"):
            for stale in folder.glob(pattern):
                stale.unlink()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, converted to its dtype. Raises ValueError for a tensor out of order or of another shape."""
        shard, expected = self._order[self._done] if self._done < len(self._order) else (-1, None)
        dtype, shape = self._layout.get(name, (None, None))
        if name != expected or tuple(tensor.shape) != shape:
            raise ValueError(f"got {name} {tuple(tensor.shape)}, expected {expected} {self._layout.get(expected)}")
        if name == self._shards[shard][0]:
            self._stream = self._partial(shard).open("wb")
            self._stream.write(self._header(shard))
        assert self._stream is not None
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
        if flat.numel():
            self._stream.write(memoryview(flat.view(torch.uint8).numpy()))
        self._done += 1
        if name == self._shards[shard][-1]:
            self._stream.close()
            self._stream = None
            self._partial(shard).rename(self._folder / self._file(shard))

    def close(self) -> None:
        """Write the index of several files. Raises ValueError when tensors are missing."""
        if self._done < len(self._order):
            raise ValueError(f"{self._order[self._done][1]} was never written")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(map(self._size, self._layout))},
                "weight_map": {name: self._file(shard) for shard, name in self._order},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")

    def abandon(self) -> None:
        """Close and remove an unfinished file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        for partial in self._folder.glob("*.safetensors.partial"):
            with suppress(FileNotFoundError):
                partial.unlink()

    def _size(self, name: str) -> int:
        dtype, shape = self._layout[name]
        return math.prod(shape) * dtype.itemsize

    def _file(self, shard: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _partial(self, shard: int) -> Path:
        return self._folder / f"{self._file(shard)}.partial"

    def _header(self, shard: int) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[shard]:
            dtype, shape = self._layout[name]
            size = self._size(name)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text
