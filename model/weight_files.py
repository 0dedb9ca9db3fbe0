"""Read and write safetensors one tensor at a time: no file is mapped or held, so 72B parameters need little memory.

The format (safetensors 0.x): 8 bytes little endian, the length of a JSON header {name: {dtype, shape, data_offsets}},
the header, the tensors' bytes, row-major.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from transformers.utils import cached_file

from radlads.tasks.job import UserError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
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
# A header of the format may not be longer.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""


class WeightFiles:
    """The tensors of a checkpoint's safetensors files, by the names that they have there."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Reads the headers alone. Raises UserError for a file that is no safetensors, or cut short."""
        self.paths = tuple(paths)
        self._entries: dict[str, _Entry] = {}
        for path in self.paths:
            self._entries |= _read_header(path)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor of its own memory; start, stop: rows of its first axis, the only ones that are read."""
        entry = self._entries[name]
        shape = entry.shape
        if shape:
            stop = shape[0] if stop is None else stop
            row_bytes = math.prod(shape[1:]) * entry.dtype.itemsize
            offset, shape = entry.offset + start * row_bytes, (stop - start, *shape[1:])
        else:
            offset = entry.offset
        raw = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        with entry.path.open("rb") as stream:
            stream.seek(offset)
            if stream.readinto(memoryview(raw.numpy())) != raw.numel():
                raise UserError(f"{entry.path} ends within '{name}'; download it again")
        return raw.view(entry.dtype).view(shape)


def open_weight_files(path: str, *, revision: str | None = None) -> WeightFiles:
    """The safetensors files of a folder or hub id, as its index lists them. Raises UserError when one is missing."""

    def find(name: str) -> Path | None:
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    try:
        index = find(_INDEX)
        names = [_SINGLE]
        if index is not None:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = {name: find(name) for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the weights of '{path}': {' '.join(str(error).split())[:300]}") from error
    missing = [name for name, found in paths.items() if found is None]
    if missing:
        raise UserError(
            f"'{path}' lacks {missing[0]}; weights are read from {_SINGLE}, or from the files that {_INDEX} lists"
        )
    return WeightFiles(found for found in paths.values() if found is not None)


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        entries = {}
        for name, value in header.items():
            if name == "__metadata__":
                continue
            start, stop = value["data_offsets"]
            dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
            if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
                raise ValueError(f"'{name}' does not fit in it")
            entries[name] = _Entry(path, dtype, shape, 8 + length + start)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole safetensors file: {' '.join(str(error).split())[:200]}") from error
    return entries


class WeightWriter:
    """Writes a model's tensors in the given order as one safetensors file, or several with an index.

    A file gets its name only when it is whole, and the index comes last, so that what a killed job leaves is never
    taken for a model.
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
        """The next tensor, converted to its dtype. Raises ValueError out of order or with another shape."""
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
            (self._folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")

    def abandon(self) -> None:
        """Close and remove a file that was begun."""
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
        return _SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

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
