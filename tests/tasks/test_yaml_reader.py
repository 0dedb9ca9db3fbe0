"""What plain scalars mean, what stays apart, and what is written so that every reader of YAML reads it the same."""

import pytest
import yaml

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import read_job
from radlads.tasks.contracts.parsing.document import DocumentError, one_line, plain_values
from radlads.tasks.contracts.parsing.yaml_reader import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("+3", 3), ("0", 0), ("1_000_000", 1_000_000), ("0x1F", 31), ("0o17", 15),
        ("1e6", 1_000_000), ("2.5e2", 250.0), ("1.0e-4", 1e-4), (".5", 0.5), ("1e-3", 1e-3), ("1e300", 1e300),
        ("9007199254740992", 2**53), ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("On", "On"), ("y", "y"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"), ("1.2.3", "1.2.3"), ("'010'", "010"), ('"1e6"', "1e6"), ('"a\\0b"', "a\0b"), ("=", "="),
        ("1__0", 10), ("_1", "_1"), ("- ", [None]), ("{a: , b: ''}", {"a": None, "b": ""}),
    ],
)  # fmt: skip
def test_scalars(text, value):
    found = parse_yaml(text, where="f")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "-07", "00", "0_1", "1" * 17, "9007199254740993", ".nan", "-.INF", "1e400"])
def test_numbers_that_are_none(text):
    with pytest.raises(DocumentError, match=r"^f:1:1: ") as caught:
        parse_yaml(text, where="f")
    assert len(str(caught.value).splitlines()) == 1


def test_what_an_alias_repeats_is_a_copy():
    made = parse_yaml("a: &a {x: [1]}\nb: *a\nc: {<<: *a, y: 2}\nd: {<<: [{x: 3, z: 4}, *a], z: 5}", where="f")
    assert made == {"a": {"x": [1]}, "b": {"x": [1]}, "c": {"x": [1], "y": 2}, "d": {"x": 3, "z": 5}}
    made["b"]["x"].append(2)
    assert made["a"] == {"x": [1]}


@pytest.mark.parametrize(
    "text", ["010", "1e6", "0o17", "1_0", "yes", "null", "~", "", "1:30", "2024-01-01", "0x1f", ".nan", "a: b",
             "\u2028", "\x85", "\ufeffx", "*a", "<<", "=", " x ", "\t", "\0", "é", "😀", "x\n", "#", "- a",
             "0b1", "1.", "1e400"]
)  # fmt: skip
def test_text_stays_text_for_every_reader(text):
    written = dump_yaml({"key": text, text or "k": 1})
    assert read_yaml(written.encode(), where="f")["key"] == text
    assert yaml.safe_load(written)["key"] == text


def test_values_of_a_program():
    assert plain_values({"a": (1, [2.5, None])}, where="w") == {"a": [1, [2.5, None]]}
    loop = {}
    loop["x"] = loop
    for value, told in (
        (loop, "w: x.x.x.x.x.x.x.x…: nested more than 40 deep"),
        ({"a": {1: 2}}, "w: a: the key 1 is not text"),
        ({"a": [0, float("inf")]}, "w: a.1: inf is not a finite number"),
        ({"a": b"x"}, "w: a: a bytes cannot be represented in JSON"),
        ([0] * 30_000, "more than 20,000 values"),
    ):
        with pytest.raises(DocumentError, match=told.replace("…", ".")):
            plain_values(value, where="w")


def test_a_message_is_one_line():
    assert one_line("a\n b\x1b[0m\u202e") == "a b\\x1b[0m\\u202e"
    assert len(one_line("x" * 10_000_000)) == 401


@pytest.mark.parametrize(
    ("data", "told"),
    [(None, "cannot read"), (b"", "is not a job.json"), (b"[1]", "is not a job.json"), (b"\xff", "is not a job.json"),
     (b"{}", "stage: Field required")],
)  # fmt: skip
def test_a_job_that_is_none(tmp_path, data, told):
    path = tmp_path / "job.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=told) as caught:
        read_job(path)
    assert len(str(caught.value).splitlines()) == 1
