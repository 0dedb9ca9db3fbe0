"""Iterates over the documents of a source: files, hub datasets, samples, recall text."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import COMPRESSED
from radlads.tasks.contracts.recipe.recipe import FilesSource, HubSource, RecallSource, SampleSource, Source
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle
from radlads.tasks.jobs.data.ruler.tasks import Material, make_puzzle
from radlads.tasks.jobs.data.text.messages import read_messages
from radlads.tasks.jobs.data.text.recall import build_document, load_filler
from radlads.tasks.jobs.data.text.text_files import (
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    clean,
    clean_documents,
    damage,
    json_rows,
    no_field,
    parquet_rows,
)
from radlads.tasks.jobs.data.text.token_encoder import text_ids
from radlads.tasks.jobs.sources import expand_paths, first_line, resolve_file


@dataclass(frozen=True)
class Document:
    """One document: either plain text or a chat."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    where: str = field(default="", compare=False)
    """File and line or row, for error messages."""
    replaced: int = 0
    """Number of invalid characters that were replaced."""
    source: int = 0
    """Index of its source in the dataset."""

    @property
    def canonical(self) -> str:
        """The text that the document's hash and size are computed from."""
        if self.text is not None:
            return self.text
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True, default=str)


@dataclass(frozen=True)
class RowReader:
    """Converts rows with fields to documents."""

    text_field: str = "text"
    messages_field: str | None = None
    replace: bool = False
    """Replace invalid characters; otherwise the first one is an error."""

    @property
    def field(self) -> str:
        return self.messages_field or self.text_field

    def documents(self, rows: Iterator[tuple[int, dict[str, Any]]], name: str, unit: str) -> Iterator[Document]:
        """Documents of (number, row), skipping empty ones. unit: `line` or `row`, for messages."""
        for number, row in rows:
            where = f"{name}, {unit} {number}"
            if self.field not in row:
                raise UserError(no_field(where, self.field, row))
            value = row[self.field]
            if value is None or value in ("", []):
                continue
            yield self._chat(value, where) if self.messages_field else self._text(value, where)

    def _text(self, value: Any, where: str) -> Document:
        if not isinstance(value, str):
            raise UserError(
                f"{where}: the field '{self.field}' is a {type(value).__name__}, not text; for chats set messages_field"
            )
        text, replaced = clean(value, lambda _: where, replace=self.replace)
        return Document(text=text, where=where, replaced=replaced)

    def _chat(self, value: Any, where: str) -> Document:
        try:
            messages, replaced = self._clean_deep(list(read_messages(value, where)), where)
        except RecursionError as error:
            raise UserError(f"{where}: its messages are nested too deeply") from error
        return Document(messages=tuple(messages), where=where, replaced=replaced)

    def _clean_deep(self, value: Any, where: str) -> tuple[Any, int]:
        if isinstance(value, str):
            return clean(value, lambda _: where, replace=self.replace)
        if isinstance(value, dict):
            keys = [self._clean_deep(key, where) for key in value]
            items = [self._clean_deep(item, where) for item in value.values()]
            cleaned = {key: item for (key, _), (item, _) in zip(keys, items, strict=True)}
            return cleaned, sum(count for _, count in keys + items)
        if isinstance(value, list):
            parts = [self._clean_deep(item, where) for item in value]
            return [item for item, _ in parts], sum(count for _, count in parts)
        return value, 0


def iterate_documents(
    source: Source, *, tokenizer: PreTrainedTokenizerBase, skip: int = 0, samples: Path | None = None
) -> Iterator[Document]:
    """The non-empty documents of a source in a fixed order, after the first `skip`.

    samples: the samples.jsonl of a `sample` source. Raises UserError with file and line for unreadable input.
    """
    if isinstance(source, SampleSource):
        if samples is None:
            raise UserError("a `sample` source needs the teacher to be sampled first")
        # Sampled text can contain NUL, which the user cannot fix.
        rows = RowReader(replace=True)
        return itertools.islice(rows.documents(json_rows(samples), str(samples), "line"), skip, None)
    if isinstance(source, RecallSource):
        return _recall_documents(source, tokenizer, skip)
    reader = _hub_documents(source) if isinstance(source, HubSource) else _file_documents(source)
    return itertools.islice(reader, skip, source.max_documents)


def _row_reader(source: FilesSource | HubSource) -> RowReader:
    return RowReader(source.text_field, source.messages_field, source.bad_characters == "replace")


def _file_documents(source: FilesSource) -> Iterator[Document]:
    for name in expand_paths(source.paths):
        yield from read_file(name, _row_reader(source), separator=source.separator)


def read_file(name: str, reader: RowReader, *, separator: str | None = None) -> Iterator[Document]:
    """Documents of one parquet, jsonl or text file, the latter two plain or compressed.

    Raises UserError for unreadable input and for a file without documents.
    """
    path = resolve_file(name)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix == ".parquet":
        documents = reader.documents(parquet_rows(path, reader.field), name, "row")
    elif suffix in JSON_SUFFIXES:
        documents = reader.documents(json_rows(path), name, "line")
    elif suffix in TEXT_SUFFIXES:
        if reader.messages_field is not None:
            raise UserError(f"{name}: a text file has no field '{reader.field}'; chats come from jsonl or parquet")
        documents = (
            Document(text=text, where=f"{name}, line {line}", replaced=replaced)
            for line, text, replaced in clean_documents(path, separator, replace=reader.replace)
        )
    else:
        known = ", ".join((".parquet", *JSON_SUFFIXES, *TEXT_SUFFIXES))
        packed = ", ".join(COMPRESSED)
        raise UserError(f"{name}: unknown kind of file; known endings are {known} (all but parquet also with {packed})")
    first = next(documents, None)
    if first is None:
        raise UserError(f"{name}: the file contains no document; remove it from the source")
    yield first
    yield from documents


def _hub_documents(source: HubSource) -> Iterator[Document]:
    # Imported here: it takes seconds, and most sources are files.
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, source.subset, split=source.split, revision=source.revision, streaming=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"hub dataset '{source.path}' cannot be opened: {first_line(error)}") from error
    return _row_reader(source).documents(_numbered(rows, source.path), source.path, "row")


def _numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row
    except ValueError as error:  # an error in the data; network errors propagate and are retried
        raise UserError(f"{name}, after row {number}: {damage(error)}") from error


def _recall_documents(source: RecallSource, tokenizer: PreTrainedTokenizerBase, skip: int) -> Iterator[Document]:
    paths = [resolve_file(name) for name in expand_paths(source.haystack)]
    filler = load_filler(paths, source.haystack_separator)
    if source.ruler:
        yield from _ruler_documents(source, tokenizer, filler if paths else [], skip)
        return
    for index in range(skip, source.documents):
        # One seed per document, so that any document can be built without the earlier ones.
        rng = random.Random(f"{source.seed}:{index}")
        length = source.lengths[index % len(source.lengths)]
        text = build_document(tokenizer, filler, length=length, rng=rng, most_facts=source.facts)
        yield Document(text=text, where=f"recall {index}")


def _ruler_documents(
    source: RecallSource, tokenizer: PreTrainedTokenizerBase, essays: Sequence[str], skip: int
) -> Iterator[Document]:
    """Prompts with their answers, as many tokens as the source's lengths; a chat's control tokens come on top."""
    if source.chat and not tokenizer.chat_template:
        raise UserError("chat is on, but the tokenizer has no chat template; leave chat out")

    def cost(puzzle: Puzzle) -> int:
        return len(text_ids(tokenizer, [puzzle.text + puzzle.reply])[0])

    for index in range(skip, source.documents):
        # Every length of one task, then of the next: no length goes with one task alone.
        turn, step = divmod(index, len(source.lengths))
        task, length = source.ruler[turn % len(source.ruler)], source.lengths[step]
        puzzle = make_puzzle(
            task,
            length=length,
            cost=cost,
            seed=f"recall:{source.seed}:{index}",
            half="training",
            material=Material(essays),
        ).puzzle
        where = f"recall {index}"
        if source.chat:
            said = (("user", puzzle.prompt), ("assistant", f"{puzzle.prefix}{puzzle.reply}".lstrip()))
            yield Document(messages=tuple({"role": role, "content": text} for role, text in said), where=where)
        else:
            yield Document(text=puzzle.text + puzzle.reply, where=where)


def first_documents(source: Source, *, tokenizer: PreTrainedTokenizerBase, count: int) -> Sequence[Document]:
    """The first documents of a source, at most `count`; none of a `sample` source."""
    if isinstance(source, SampleSource):
        return []
    return list(itertools.islice(iterate_documents(source, tokenizer=tokenizer), count))
