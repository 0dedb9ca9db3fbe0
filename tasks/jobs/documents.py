"""Documents of a corpus, one after the other, whatever it is stored in."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from radlads.tasks.job import UserError
from radlads.tasks.jobs.recall import build_document, load_filler
from radlads.tasks.jobs.sources import expand_paths, first_line, resolve_file
from radlads.tasks.recipe import FilesSource, HubSource, RecallSource, SampleSource, Source

_READ_CHARS = 1 << 20
_TEXT_SUFFIXES = (".txt", ".text", ".md")
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Document:
    """One document: plain text, or a chat (exactly one of the two)."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None

    @property
    def canonical(self) -> str:
        """What the document's hash, and its size, are made of."""
        if self.text is not None:
            return self.text
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True)


def iterate_documents(
    source: Source, *, tokenizer: PreTrainedTokenizerBase, skip: int = 0, samples: Path | None = None
) -> Iterator[Document]:
    """The source's documents in its own fixed order, empty ones left out, without the first `skip`.

    samples: samples.jsonl, what a `sample` source has sampled. Raises UserError for what cannot be read.
    """
    if isinstance(source, SampleSource):
        if samples is None:
            raise UserError("a `sample` source needs the teacher to be sampled first")
        return itertools.islice(_rows_to_documents(_json_rows(samples), "text", None, str(samples)), skip, None)
    if isinstance(source, RecallSource):
        return _recall_documents(source, tokenizer, skip)
    reader = _hub_documents(source) if isinstance(source, HubSource) else _file_documents(source)
    return itertools.islice(reader, skip, source.max_documents)


def _file_documents(source: FilesSource) -> Iterator[Document]:
    for name in expand_paths(source.paths):
        yield from read_file(
            name, text_field=source.text_field, messages_field=source.messages_field, separator=source.separator
        )


def read_file(
    name: str, *, text_field: str = "text", messages_field: str | None = None, separator: str | None = None
) -> Iterator[Document]:
    """Documents of one parquet, jsonl or text file, the latter two plain or gzipped. Raises UserError."""
    path = resolve_file(name)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        yield from _rows_to_documents(
            _parquet_rows(path, messages_field or text_field), text_field, messages_field, name
        )
    elif suffix in _JSON_SUFFIXES:
        yield from _rows_to_documents(_json_rows(path), text_field, messages_field, name)
    elif suffix in _TEXT_SUFFIXES:
        if messages_field is not None:
            raise UserError(f"{name}: a text file has no field '{messages_field}'; chats come from jsonl or parquet")
        yield from _text_documents(path, separator)
    else:
        known = ", ".join((".parquet", *_JSON_SUFFIXES, *_TEXT_SUFFIXES))
        raise UserError(f"{name}: unknown kind of file; known endings are {known} (all but parquet also with .gz)")


def _open_text(path: Path) -> AbstractContextManager[IO[str]]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8")
    return path.open(encoding="utf-8")


def _text_documents(path: Path, separator: str | None) -> Iterator[Document]:
    rest = ""
    try:
        with _open_text(path) as stream:
            while chunk := stream.read(_READ_CHARS):
                rest += chunk
                if separator:
                    *whole, rest = rest.split(separator)
                    yield from (Document(text=text.strip()) for text in whole if text.strip())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    if rest.strip():
        yield Document(text=rest.strip())


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with _open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: expected a JSON object with fields")
                    yield row
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not valid JSON ({error.msg}); one object a line is expected"
        ) from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _parquet_rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    try:
        table = pq.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise UserError(_no_field(str(path), field, table.schema_arrow.names))
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            yield from batch.to_pylist()
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def _hub_documents(source: HubSource) -> Iterator[Document]:
    # Imported here: it takes seconds, and most corpora are files.
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, source.subset, split=source.split, revision=source.revision, streaming=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"hub dataset '{source.path}' cannot be opened: {first_line(error)}") from error
    return _rows_to_documents(iter(rows), source.text_field, source.messages_field, source.path)


def _rows_to_documents(
    rows: Iterator[dict[str, Any]], text_field: str, messages_field: str | None, where: str
) -> Iterator[Document]:
    field = messages_field or text_field
    make: Callable[[Any, str], Document] = _chat if messages_field else _text
    for row in rows:
        if field not in row:
            raise UserError(_no_field(where, field, row))
        if row[field]:
            yield make(row[field], where)


def _text(value: Any, where: str) -> Document:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the text field holds a {type(value).__name__}, not text; for chats set messages_field"
        )
    return Document(text=value)


def _chat(value: Any, where: str) -> Document:
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise UserError(f"{where}: messages_field must hold a list of {{role, content}} messages")
    return Document(messages=tuple(value))


def _no_field(where: str, field: str, present: Any) -> str:
    return f"{where} has no field '{field}'; it has: {', '.join(present)}"


def _recall_documents(source: RecallSource, tokenizer: PreTrainedTokenizerBase, skip: int) -> Iterator[Document]:
    paths = [resolve_file(name) for name in expand_paths(source.haystack)]
    filler = load_filler(paths, source.haystack_separator)
    for index in range(skip, source.documents):
        # One seed a document: any of them can be made without those before it.
        rng = random.Random(f"{source.seed}:{index}")
        length = source.lengths[index % len(source.lengths)]
        yield Document(text=build_document(tokenizer, filler, length=length, rng=rng))


def first_documents(source: Source, *, tokenizer: PreTrainedTokenizerBase, count: int) -> Sequence[Document]:
    """The first documents of a source that can be read before the job runs (none of a `sample` source)."""
    if isinstance(source, SampleSource):
        return []
    return list(itertools.islice(iterate_documents(source, tokenizer=tokenizer), count))
