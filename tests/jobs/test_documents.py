"""Data files that somebody else wrote: what is wrong with one is a single line with its place and its cure."""

from __future__ import annotations

import gzip
import json
import lzma
import resource
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.sections import FilesSource, HubSource
from radlads.tasks.jobs.data.text import text_files
from radlads.tasks.jobs.data.text.documents import Document, iterate_documents
from radlads.tasks.jobs.data.text.recall import load_filler

# Without the time in the header, so that both processes of a run name a test alike.
compress = partial(gzip.compress, mtime=0)

GOOD = '{"text": "one"}\n'


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def read(path: Path, **options: Any) -> list[Document]:
    source = FilesSource(kind="files", paths=(str(path),), **options)
    return list(iterate_documents(source, tokenizer=None))  # type: ignore[arg-type]


def texts(path: Path, **options: Any) -> list[str | None]:
    return [document.text for document in read(path, **options)]


def parquet(rows: list[Any], kind: pa.DataType | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(rows, kind)}), sink)
    return bytes(sink.getvalue())


def bad_utf8_parquet() -> bytes:
    binary = pa.array([b"one", b"tw\xffo"], pa.binary())
    return parquet(pa.StringArray.from_buffers(len(binary), binary.buffers()[1], binary.buffers()[2]))


def chat(content: str) -> str:
    return json.dumps({"m": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]}) + "\n"


PARQUET = parquet(["one", "two"] * 5000)
CASES: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "surrogate": ("a.jsonl", (GOOD + '{"text": "x\\ud800y"}').encode(), {}, r"line 2: a lone surrogate, \\ud800"),
    "surrogate in a chat": ("a.jsonl", chat("\ud800").encode(), {"messages_field": "m"}, "line 1: a lone surrogate"),
    "surrogate in a key": (
        "a.jsonl",
        b'{"m": [{"role": "user", "content": "", "\\udd00": 1}]}',
        {"messages_field": "m"},
        "line 1: a lone surrogate",
    ),
    "NUL": ("a.jsonl", (GOOD + '{"text": "x\\u0000y"}').encode(), {}, "line 2: a NUL"),
    "NUL in a chat": ("a.jsonl", (chat("a") + chat("\0")).encode(), {"messages_field": "m"}, "line 2: a NUL"),
    "NUL in a text": ("a.txt", b"one\ntwo\nth\0ree\n", {}, "line 3: a NUL"),
    "NUL in a later text": ("a.txt", b"one\n---\n\ntwo\nth\0ree\n", {"separator": "---"}, "line 5: a NUL"),
    "NUL in parquet": ("a.parquet", parquet(["one", "t\0wo"]), {}, "row 2: a NUL"),
    "bytes in jsonl": (
        "a.jsonl",
        GOOD.encode() + b'{"text": "x\xe9y"}\n',
        {},
        "line 2: the byte 0xe9 is not UTF-8; fix",
    ),
    "bytes in jsonl.gz": (
        "a.jsonl.gz",
        compress(GOOD.encode() + b'{"text": "\xff"}'),
        {},
        "line 2: the byte 0xff",
    ),
    "bytes in a chat": (
        "a.jsonl",
        b'{"m": [{"role": "user", "content": "\x80"}]}',
        {"messages_field": "m"},
        "line 1: the byte 0x80",
    ),
    "bytes in a text": ("a.txt", b"one\r\ntw\xc3\r\n", {}, "line 2: the byte 0xc3"),
    "bytes in a text.gz": ("a.txt.gz", compress(b"\n\none\ntw\xfe"), {}, "line 4: the byte 0xfe"),
    "bytes in parquet": ("a.parquet", bad_utf8_parquet(), {}, "row 2: the byte 0xff"),
    "bytes in a binary column": ("a.parquet", parquet([b"one"]), {}, "row 1: the field 'text' is a bytes"),
    "UTF-16": ("a.txt", "one".encode("utf-16"), {}, "UTF-16 or UTF-32, not UTF-8; convert"),
    "UTF-16 jsonl.gz": ("a.jsonl.gz", compress(GOOD.encode("utf-16")), {}, "UTF-16 or UTF-32"),
    "cut parquet": ("a.parquet", PARQUET[:-20], {}, "after row 0: the file is damaged or truncated"),
    "damaged parquet": ("a.parquet", b"PAR1" + b"\0" * 30 + PARQUET[34:], {}, "damaged or truncated"),
    "no parquet": ("a.parquet", b"hello", {}, "damaged or truncated"),
    "cut gz": ("a.txt.gz", compress(b"one two three" * 999)[:-30], {}, r"damaged or truncated.*download it again"),
    "cut jsonl.gz": (
        "a.jsonl.gz",
        compress((GOOD * 9999).encode())[:-12],
        {},
        r"after line [0-9]+: the file is damaged",
    ),
    "damaged gz": (
        "a.txt.gz",
        compress(bytes(range(32, 127)) * 99)[:20] + b"\xaa" * 60,
        {},
        "damaged or truncated",
    ),
    "cut xz": ("a.txt.xz", lzma.compress(b"one two three" * 999)[:-30], {}, r"line 1: .*damaged or truncated"),
    "second part of an xz": (
        "a.txt.xz",
        lzma.compress(b"one") + b"\xfe" + lzma.compress(b"two")[1:],
        {},
        "line 1: .*damaged or truncated",
    ),
    "no xz": ("a.jsonl.xz", GOOD.encode(), {}, "after line 0: the file is damaged"),
    "cut zst": ("a.txt.zst", zstd(bytes(range(32, 127)) * 99)[:-9], {}, r"line 1: .*damaged or truncated.*download"),
    "no zst": ("a.jsonl.zst", GOOD.encode(), {}, "after line 0: the file is damaged"),
    "bytes in jsonl.zst": ("a.jsonl.zst", zstd(b'{"text": "o\xffe"}'), {}, "line 1: the byte 0xff"),
    "UTF-16 xz": ("a.jsonl.xz", lzma.compress(GOOD.encode("utf-16")), {}, "UTF-16 or UTF-32"),
    "no gz": ("a.jsonl.gz", GOOD.encode(), {}, "after line 0: the file is damaged"),
    "an array line": (
        "a.jsonl",
        (GOOD + "[1, 2]\n").encode(),
        {},
        r"line 2: expected a JSON object .*, got an array",
    ),
    "a number line": ("a.jsonl", (GOOD + "\n17\n").encode(), {}, r"line 3: expected a JSON object .*, got a number"),
    "null": ("a.jsonl", b"null\n", {}, r"line 1: expected .* got null"),
    "an array over lines": (
        "a.json",
        b'[\n{"text": "one"}\n]\n',
        {},
        r"line 1: not valid JSON .*array; write one object per line",
    ),
    "no JSON": ("a.jsonl", (GOOD + '{"text": one}\n').encode(), {}, r"line 2: not valid JSON .*character 10"),
    "a cut line": ("a.jsonl", (GOOD + '{"text": "tw').encode(), {}, "line 2: not valid JSON"),
    "a huge number": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", {}, "line 1: not usable JSON"),
    "deep nesting": ("a.jsonl", b"[" * 200_000, {}, "line 1: not"),
    "no such field": (
        "a.jsonl",
        b'{"txt": "one", "id": 1}\n',
        {},
        "line 1 has no field 'text'; it has: txt, id; did you mean 'txt'",
    ),
    "no such column": (
        "a.parquet",
        PARQUET,
        {"text_field": "texts"},
        "has no field 'texts'; it has: text; did you mean 'text'",
    ),
    "no such field later": (
        "a.jsonl",
        (GOOD + '{"body": "two"}').encode(),
        {},
        "line 2 has no field 'text'; it has: body",
    ),
    "not text": ("a.jsonl", b'{"text": ["one"]}', {}, "line 1: the field 'text' is a list"),
    "an empty file": ("a.jsonl", b"", {}, "the file contains no document; remove it from the source"),
    "a blank file": ("a.txt", b" \n\n", {}, "the file contains no document"),
    "an empty gz": ("a.txt.gz", compress(b""), {}, "the file contains no document"),
    "an empty parquet": ("a.parquet", parquet([], pa.string()), {}, "the file contains no document"),
    "nothing but nulls": ("a.parquet", parquet([None, ""]), {}, "the file contains no document"),
    "a message without role": (
        "a.jsonl",
        (chat("a") + '{"m": [{"content": "x"}]}').encode(),
        {"messages_field": "m"},
        "line 2, message 1: it has no role",
    ),
    "an image": (
        "a.jsonl",
        b'{"m": [{"role": "user", "content": [{"type": "image"}]}]}',
        {"messages_field": "m"},
        r"line 1, message 1: .*'image'",
    ),
    "a chat nested deeply": (
        "a.jsonl",
        b'{"m": [{"role": "user", "content": "Hi", "x": ' + b"[" * 700 + b"]" * 700 + b"}]}",
        {"messages_field": "m"},
        "line 1: (its messages are nested too deeply|not usable JSON)",
    ),
    "a chat as text": ("a.jsonl", b'{"m": "Hi"}', {"messages_field": "m"}, r"line 1: expected a list .* got text"),
    "a kind unknown": ("a.csv", b"text\none\n", {}, "unknown kind of file"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_is_one_line_with_its_place(tmp_path: Path, name: str):
    file, content, options, message = CASES[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be written to a log


@pytest.mark.parametrize(
    ("file", "content", "options", "expected"),
    [
        ("a.txt", b"\xef\xbb\xbfone\r\n--\r\ntwo\rthree", {"separator": "\n--\n"}, ["one", "two\nthree"]),
        ("a.txt.gz", compress(b"\xef\xbb\xbfone\r\n--\r\ntwo"), {"separator": "--"}, ["one", "two"]),
        ("a.txt.xz", lzma.compress(b"\xef\xbb\xbfone\r\n--\r\ntwo"), {"separator": "--"}, ["one", "two"]),
        ("a.txt.xz", lzma.compress(b"one--") + bytes(8) + lzma.compress(b"two"), {"separator": "--"}, ["one", "two"]),
        ("a.txt.zst", zstd(b"\xef\xbb\xbfone\r\n--\r") + zstd(b"\ntwo"), {"separator": "--"}, ["one", "two"]),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b'\r\n{"text": "t\\r\\nwo"}\r\n', {}, ["one", "t\r\nwo"]),
        ("a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), {}, ["a\u2028b\x85c"]),
        ("a.jsonl", b'{"text": "\\ud83d\\ude42"}', {}, ["🙂"]),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n{"text": "one"}', {}, ["one"]),
        ("a.jsonl", b'{"text": ""}\n{"text": []}\n{"text": "one"}', {}, ["one"]),
        ("a.parquet", parquet(["one", None, "", "two"], pa.large_string()), {}, ["one", "two"]),
    ],
)
def test_what_is_only_unusual_is_read(tmp_path: Path, file: str, content: bytes, options: Any, expected: list[str]):
    (tmp_path / file).write_bytes(content)
    assert texts(tmp_path / file, **options) == expected


@pytest.mark.parametrize(
    ("file", "content", "options"),
    [
        ("a.txt", b"a\xffb\0", {}),
        ("a.txt.gz", compress(b"a\xffb\0"), {}),
        ("a.jsonl", b'{"text": "a\xffb\\u0000"}', {}),
        ("a.jsonl", b'{"text": "a\\ud800b\\u0000"}', {}),
        ("a.parquet", parquet(pa.array([b"a\xffb\0"], pa.binary()).view(pa.string())), {}),
        ("a.jsonl", b'{"m": [{"role": "user", "content": "a\xffb\\u0000"}]}', {"messages_field": "m"}),
    ],
)
def test_bad_characters_can_be_replaced_and_are_counted(tmp_path: Path, file: str, content: bytes, options: Any):
    (tmp_path / file).write_bytes(content)
    (document,) = read(tmp_path / file, bad_characters="replace", **options)
    text = document.messages[0]["content"] if document.messages else document.text
    assert (text, document.replaced) == ("a\ufffdb\ufffd", 2)


def test_separators_across_chunks_and_lines_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    stories = [f"story {i}\nends" * (i % 3 + 1) for i in range(50)]
    path.write_text("<|endoftext|>\n".join(stories), encoding="utf-8")
    for size in (1, 2, 3, 7, 13, 64, 1 << 20):
        monkeypatch.setattr(text_files, "_READ_CHARACTERS", size)
        found = list(text_files.text_documents(path, "<|endoftext|>"))
        assert [text for _, text in found] == stories
        lines = path.read_text().splitlines()
        assert all(lines[line - 1].split("<|endoftext|>")[-1] == text.splitlines()[0] for line, text in found)


def test_a_line_without_end_is_refused_within_its_memory(tmp_path: Path):
    content = GOOD.encode() + b'{"text": "' + b"word " * (40 << 20)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.txt").write_bytes(content)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as stream:
        stream.write(content)
    for name, line in (("a.jsonl", 2), ("a.txt", 1), ("a.jsonl.gz", 2)):
        path = tmp_path / name
        tracemalloc.start()
        with pytest.raises(UserError, match=f"{name}, line {line}: .*64 million characters"):
            list(text_files.text_documents(path, None) if path.suffix == ".txt" else text_files.json_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
        tracemalloc.stop()


def test_a_file_that_goes_is_one_line(tmp_path: Path):
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (tmp_path / name).mkdir()
        reader: Callable[..., Any] = {
            "a.txt": lambda path: text_files.text_documents(path, None),
            "a.jsonl": text_files.json_rows,
            "a.parquet": lambda path: text_files.parquet_rows(path, "text"),
        }[name]
        with pytest.raises(UserError, match=r"cannot be read|damaged"):
            list(reader(tmp_path / name))


def test_rows_of_the_hub_are_checked_alike(monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": "one"}, {"text": "t\0wo"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    source = HubSource(kind="hub", path="org/stories")
    with pytest.raises(UserError, match="org/stories, row 2: a NUL"):
        list(iterate_documents(source, tokenizer=None))  # type: ignore[arg-type]


def test_haystacks_are_read_by_the_same_rules(tmp_path: Path):
    path = tmp_path / "hay.txt"
    path.write_bytes(b"One cat.\nTwo \xff dogs.")
    with pytest.raises(UserError, match=r"hay\.txt, line 2: the byte 0xff"):
        load_filler([path])
    path = tmp_path / "hay.txt.gz"
    path.write_bytes(compress(b"One cat. Two dogs." * 99)[:-9])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_filler([path])


def test_a_haystack_of_json_lines_is_its_texts(tmp_path: Path):
    path = tmp_path / "hay.jsonl.gz"
    path.write_bytes(compress(b'{"text": "One cat.\\nTwo dogs.", "title": "A tale."}\n{"text": "Three."}\n'))
    assert load_filler([path]) == ["One cat.", "Two dogs.", "Three."]
    path.write_bytes(compress(b'{"text": "One cat."}\n{"body": "Two dogs."}\n'))
    with pytest.raises(UserError, match=r"hay\.jsonl\.gz, line 2: no field 'text'"):
        load_filler([path])


def test_many_files_are_read_with_few_handles(tmp_path: Path):
    for number in range(200):
        (tmp_path / f"{number:03d}.jsonl").write_text(GOOD)
        (tmp_path / f"{number:03d}.parquet").write_bytes(parquet(["one"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, hard))
    try:
        assert len(read(tmp_path / "*.jsonl")) == len(read(tmp_path / "*.parquet")) == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
