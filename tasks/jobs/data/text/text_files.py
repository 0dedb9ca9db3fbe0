"""Readers for text, JSON-lines and parquet files; every error is one line with file and line or row.

Bytes that are not UTF-8 are decoded to lone surrogates (`surrogateescape`), so that one check, `clean`, detects them,
the lone surrogates of JSON escapes, and NUL.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from radlads.tasks.contracts.errors import UserError, did_you_mean
from radlads.tasks.jobs.sources import first_line

MAX_CHARACTERS = 64 << 20
"""Maximum length of a document or a JSON line. A longer one indicates a missing separator or line break."""
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
EXPANSION = {".gz": 3.0, ".xz": 4.0, ".zst": 3.5, ".parquet": 2.5}
"""Suffix of a compressed file → bytes of text for each of its bytes, roughly."""
_READ_CHARACTERS = 1 << 20
_READ_BYTES = 1 << 16
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_REPLACEMENT = "\ufffd"


def clean(text: str, where: Callable[[int], str], *, replace: bool) -> tuple[str, int]:
    """(text, replaced): a text that is valid UTF-8 without NUL, and the number of replaced characters.

    where: position of a character, for the message. replace: substitute U+FFFD for each invalid character; otherwise
    raises UserError for the first one.
    """
    if "\0" not in text and _is_utf8(text):
        return text, 0
    bad = [at for at, character in enumerate(text) if character == "\0" or "\ud800" <= character <= "\udfff"]
    if not replace:
        raise UserError(
            f"{where(bad[0])}: {_name_of(text[bad[0]])}; fix the file, or set bad_characters: replace on the source"
        )
    characters = list(text)
    for at in bad:
        characters[at] = _REPLACEMENT
    return "".join(characters), len(bad)


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(character: str) -> str:
    if character == "\0":
        return "a NUL character"
    if "\udc80" <= character <= "\udcff":
        return f"the byte 0x{ord(character) - 0xDC00:02x} is not UTF-8"
    return f"a lone surrogate, \\u{ord(character):04x}, is not a character"


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a plain or compressed UTF-8 file as text, without byte-order mark. Raises UserError for UTF-16, UTF-32."""
    with _open_binary(path) as binary:
        beginning = binary.peek(4)[:4]
        if beginning.startswith(_WIDE_MARKS):
            raise UserError(f"{path}: this is UTF-16 or UTF-32, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
        yield io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _open_binary(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return cast(io.BufferedReader, gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return io.BufferedReader(_XzFile(path))
    if path.suffix == ".zst":
        if not pa.Codec.is_available("zstd"):
            raise UserError(f"{path}: this build of pyarrow reads no .zst; unpack it (unzstd), or use .gz or .xz")
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


class _XzFile(io.RawIOBase):
    """All streams of a .xz file. lzma.open ignores what follows a stream and does not begin one, which may be a damaged
    second part, and refuses the padding with zeros that the format allows."""

    def __init__(self, path: Path) -> None:
        self._file, self._decoder, self._rest = path.open("rb"), lzma.LZMADecompressor(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view, data = memoryview(buffer).cast("B"), b""
        while not data:
            if self._decoder.eof:
                self._rest = self._rest.lstrip(b"\0")
                if self._rest:
                    self._decoder = lzma.LZMADecompressor()
                    continue
            if not self._rest and self._decoder.needs_input | self._decoder.eof:
                self._rest = self._file.read(_READ_BYTES)
                if not self._rest and self._decoder.eof:
                    return 0
                if not self._rest:
                    raise EOFError("it ends within a compressed stream")
                continue
            data = self._decoder.decompress(self._rest, len(view))
            self._rest = self._decoder.unused_data
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def text_documents(path: Path, separator: str | None) -> Iterator[tuple[int, str]]:
    """Yield (first line, document) for the stripped, non-empty documents of a text file.

    separator: the text between documents; None: the file is one document. CRLF is read as LF. Raises UserError.
    """
    rest, line, searched = "", 1, 0
    try:
        with open_text(path) as stream:
            while chunk := stream.read(_READ_CHARACTERS):
                rest += chunk
                start = 0
                while separator and (at := rest.find(separator, max(start, searched))) >= 0:
                    piece = rest[start : at + len(separator)]
                    yield from _stripped(line, rest[start:at])
                    line += piece.count("\n")
                    start = at + len(separator)
                rest = rest[start:]
                searched = max(0, len(rest) - len(separator or "") + 1)
                if len(rest) > MAX_CHARACTERS:
                    raise UserError(
                        f"{path}, line {line}: a document of more than {MAX_CHARACTERS >> 20} million characters "
                        "begins here; set `separator` to the text between documents, or split the file"
                    )
    except _UNREADABLE as error:
        raise UserError(f"{path}, after line {line + rest.count(chr(10))}: {damage(error)}") from error
    yield from _stripped(line, rest)


def clean_documents(path: Path, separator: str | None, *, replace: bool = False) -> Iterator[tuple[int, str, int]]:
    """Yield (line, document, characters replaced) for a text file. Raises UserError."""
    for line, text in text_documents(path, separator):

        def place(at: int, line: int = line, text: str = text) -> str:
            return f"{path}, line {line + text[:at].count(chr(10))}"

        yield line, *clean(text, place, replace=replace)


def _stripped(line: int, text: str) -> Iterator[tuple[int, str]]:
    if body := text.strip():
        yield line + text[: text.index(body[0])].count("\n"), body


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) for a file with one JSON object per line; empty lines are skipped. Raises UserError."""
    number = 0
    try:
        with open_text(path, newline="\n") as stream:
            while line := stream.readline(MAX_CHARACTERS + 1):
                number += 1
                if len(line) > MAX_CHARACTERS:
                    raise UserError(
                        f"{path}, line {number}: longer than {MAX_CHARACTERS >> 20} million characters; "
                        "expected one JSON object per line"
                    )
                if line.strip():
                    yield number, _json_object(line, f"{path}, line {number}")
    except _UNREADABLE as error:
        raise UserError(f"{path}, after line {number}: {damage(error)}") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        # A JSON array over several lines fails on its first line.
        hint = " (this starts a JSON array; write one object per line)" if line.lstrip().startswith("[") else ""
        raise UserError(
            f"{place}: not valid JSON ({error.msg}, character {error.colno}); expected one object per line{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not usable JSON: {first_line(error)}") from error
    if not isinstance(row, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "true or false"}.get(type(row), "a number")
        raise UserError(f'{place}: expected a JSON object with fields, {{"text": ...}}, got {kind}')
    return row


def parquet_rows(path: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row from 1, {field: value}) for a parquet file. Raises UserError."""
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise UserError(no_field(str(path), field, table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in _values(batch.column(0), f"{path}, row {number + 1}"):
                    number += 1
                    yield number, {field: value}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}, after row {number}: {damage(error)}") from error


def _values(column: pa.Array, place: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise UserError(f"{place} or soon after: bytes that are not UTF-8 ({first_line(error)})") from error
        raw = column.cast(pa.large_binary()).to_pylist()
        values = [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    return values


def damage(error: BaseException) -> str:
    """The error text for a file that cannot be read further."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"the file is damaged or truncated ({first_line(error)}); write or download it again"


def no_field(where: str, field: str, present: Iterable[str]) -> str:
    """The error text for a missing field."""
    names = list(present)
    return f"{where} has no field '{field}'; it has: {', '.join(names) or 'none'}{did_you_mean(field, names)}"
