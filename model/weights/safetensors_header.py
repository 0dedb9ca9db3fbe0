"""Read and check the header of a safetensors file without reading the tensors.

The format (safetensors 0.x): 8 bytes little endian, the length of a JSON header {name: {dtype, shape, data_offsets}},
the header, the tensors' bytes, row-major and without a gap between them.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from radlads.tasks.contracts.errors import UserError

# Several times what the largest published checkpoints would need in one file. The format allows 100 MB, which would
# take a minute and a gigabyte.
MAX_HEADER_BYTES = 25_000_000
# Bits per number; all dtypes of safetensors 0.8.
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
_KEYS = {"dtype", "shape", "data_offsets"}
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place in a file, dtype and shape."""

    path: Path
    dtype: str
    """The format's name: F32, BF16, I8, ..."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name → entry of every tensor of a file. Raises UserError for a truncated or invalid file."""
    try:
        with path.open("rb") as stream:
            return parse_header(stream, path.stat().st_size, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def parse_header(stream: BinaryIO, size: int, path: Path) -> dict[str, TensorEntry]:
    """As `read_header`, for an open file of `size` bytes; error messages name it `path`."""
    try:
        start = stream.read(8)
        if len(start) < 8:
            raise ValueError(f"it has {size} bytes")
        if (start + stream.read(len(_POINTER) - 8)).startswith(_POINTER):
            raise ValueError("it is the pointer that Git LFS leaves in place of the file; run `git lfs pull`")
        stream.seek(8)
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {length} bytes; up to {MAX_HEADER_BYTES} are read")
        if 8 + length > size:
            raise ValueError(f"its header is longer than the file ({size} bytes)")
        header = strict_json(stream.read(length).decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("its __metadata__ are no texts")
        entries = {name: _entry(name, value, path, 8 + length) for name, value in header.items()}
        _check_tiling(header, size - 8 - length)
    except (struct.error, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path} is no whole safetensors file: {reason}") from error
    return entries


def strict_json(text: str) -> Any:
    """Parsed JSON. Raises ValueError for a duplicate key in an object (readers differ in which one they use)."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {short_name(twice)} stands in it twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def short_name(name: str) -> str:
    """A name from a file, quoted, escaped to one printable line."""
    quoted = ascii(name)
    return quoted if len(quoted) <= 120 else f"{quoted[:100]}...'"


def _entry(name: str, value: Any, path: Path, data_start: int) -> TensorEntry:
    if not name.isprintable():
        raise ValueError(f"{short_name(name)} is no name of a tensor")
    if not isinstance(value, dict) or not value.keys() >= _KEYS:
        raise ValueError(f"{short_name(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{short_name(name)} is of the unknown dtype {short_name(str(dtype))}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise ValueError(f"{short_name(name)} has a shape or data_offsets that are no lists of sizes")
    # Bounded before it is multiplied: a header can claim sizes of thousands of digits.
    if any(dimension >= 2**63 for dimension in shape):
        raise ValueError(f"{short_name(name)} has a dimension beyond 2^63")
    bits, (start, stop) = math.prod(shape) * _BITS[dtype], offsets
    if bits % 8 or stop - start != bits // 8:
        raise ValueError(
            f"{short_name(name)} is {dtype} {shape}, {bits // 8} bytes, but its data_offsets span {stop - start}"
        )
    return TensorEntry(path, dtype, tuple(shape), data_start + start)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_tiling(header: dict[str, Any], data_bytes: int) -> None:
    """The tensors' bytes follow one another from the first to the last of the file."""
    end = 0
    for (start, stop), name in sorted((tuple(value["data_offsets"]), name) for name, value in header.items()):
        if start != end:
            kind = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise ValueError(f"{short_name(name)} {kind}: it begins at byte {start} of the data, expected {end}")
        end = stop
        if end > data_bytes:
            raise ValueError(
                f"{short_name(name)} does not fit in it: the data end at byte {data_bytes}, it ends at {end}; "
                "download it again"
            )
    if end != data_bytes:
        raise ValueError(f"{data_bytes - end} bytes follow the last tensor")
