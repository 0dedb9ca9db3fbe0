"""Read and check the header of a GGUF file without reading the tensors.

The format (GGUF 2 and 3, github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: `GGUF`, version, the counts
of tensors and of settings; the settings (key, type, value); the tensors (name, dimensions, type, offset); their bytes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from radlads.tasks.contracts.errors import UserError

_VERSIONS = (2, 3)
# Far above any published file; a damaged header claims more.
_MOST_ENTRIES, _MOST_ITEMS, _MOST_TEXT, _MOST_DIMENSIONS = 1 << 17, 1 << 25, 1 << 24, 8
_ALIGNMENT = 32
# Type of a setting → format of struct; text and lists are apart.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_WORDS = "tokenizer."  # beginning of the keys of a vocabulary


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's name, shape (in torch's order), ggml type, and its first byte behind the header."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def count(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """settings: key → number or text; of a list its length. data_start: where the tensors' bytes begin."""

    path: Path
    size: int
    settings: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises UserError, one line, for a file that is truncated or is no GGUF."""
    try:
        with path.open("rb") as stream:
            return _parse(stream, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, struct.error, MemoryError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is no whole GGUF file: {reason}; download it again") from error


def write_without_words(header: GgufHeader, target: Path) -> None:
    """A file with the header's settings but the lists of the tokenizer, its tensors, and zeros as their bytes, which
    take no room on the disk: for readers that go through lists item by item, for ten seconds."""
    with header.path.open("rb") as stream:
        start = stream.read(8)
        num_tensors, num_settings = _unpack(stream, "QQ")
        kept = [piece for piece in (_setting_bytes(stream) for _ in range(num_settings)) if piece]
        tensors = stream.read(header.data_start - stream.tell())
    with target.open("wb") as out:
        out.write(b"".join([start, struct.pack("<QQ", num_tensors, len(kept)), *kept, tensors]))
        out.truncate(out.tell() + max(0, header.size - header.data_start) + header.data_start)


def _setting_bytes(stream: BinaryIO) -> bytes:
    """Of the next setting; none of a list of the tokenizer."""
    begin = stream.tell()
    key, (kind,) = _text(stream), _unpack(stream, "I")
    _value(stream, kind)
    end = stream.tell()
    if kind == _LIST and key.startswith(_WORDS):
        return b""
    stream.seek(begin)
    return _exactly(stream, end - begin)


def _parse(stream: BinaryIO, path: Path) -> GgufHeader:
    size = path.stat().st_size
    if stream.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    (version,) = _unpack(stream, "I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}; 2 and 3, little endian, are read")
    num_tensors, num_settings = _unpack(stream, "QQ")
    if max(num_tensors, num_settings) > _MOST_ENTRIES:
        raise ValueError(f"it claims {num_tensors} tensors and {num_settings} settings")
    settings: dict[str, Any] = {}
    for _ in range(num_settings):
        key = _text(stream)
        settings[key] = _value(stream, *_unpack(stream, "I"))
    tensors = tuple(_tensor(stream) for _ in range(num_tensors))
    alignment = settings.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment}")
    start = math.ceil(stream.tell() / alignment) * alignment
    return GgufHeader(path, size, settings, tensors, start)


def _tensor(stream: BinaryIO) -> GgufTensor:
    name = _text(stream)
    (dimensions,) = _unpack(stream, "I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
    shape = _unpack(stream, f"{dimensions}Q")
    kind, offset = _unpack(stream, "IQ")
    return GgufTensor(name, tuple(reversed(shape)), kind, offset)


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind in _NUMBERS:
        return _unpack(stream, _NUMBERS[kind])[0]
    if kind == _TEXT:
        return _text(stream)
    if kind != _LIST:
        raise ValueError(f"it has a setting of the unknown type {kind}")
    item, length = _unpack(stream, "IQ")
    if length > _MOST_ITEMS:
        raise ValueError(f"it has a list of {length} entries")
    if item in _NUMBERS:
        stream.seek(length * struct.calcsize(f"<{_NUMBERS[item]}"), 1)
    else:
        for _ in range(length):
            _value(stream, item)
    return length


def _text(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "Q")
    if length > _MOST_TEXT:
        raise ValueError(f"it has a text of {length} bytes")
    return _exactly(stream, length).decode("utf-8")


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", _exactly(stream, struct.calcsize(f"<{form}")))


def _exactly(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise ValueError("it ends within its header")
    return data
