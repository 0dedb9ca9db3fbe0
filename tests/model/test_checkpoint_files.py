"""Which files hold a checkpoint's tensors: one answer, or one line that says why there is none."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from radlads.model.weights import checkpoint_files
from radlads.model.weights.checkpoint_files import INDEX, find_weight_files, read_headers
from radlads.model.weights.weight_files import open_weight_files
from radlads.tasks.contracts.errors import UserError


def shard(folder: Path, number: int, of: int, **tensors: Tensor) -> str:
    name = f"model-{number:05d}-of-{of:05d}.safetensors"
    save_file(tensors, folder / name)
    return name


def index(folder: Path, placed: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """a and b in two shards."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    first = shard(folder, 1, 2, a=torch.full((2,), 1.0))
    index(folder, {"a": first, "b": shard(folder, 2, 2, b=torch.full((3,), 2.0))})
    return folder


def refused(folder: Path, words: str) -> None:
    """Whoever asks is told the same, in one line."""
    with pytest.raises(UserError, match=words) as caught:
        open_weight_files(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_folder_of_one_file_and_one_of_shards(sharded: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [path.name for path in find_weight_files(str(tmp_path))] == ["model.safetensors"]
    assert [path.name for path in find_weight_files(str(sharded))] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    files = open_weight_files(str(sharded))
    assert files.paths == list(find_weight_files(str(sharded)))
    assert torch.equal(files.read("b"), torch.full((3,), 2.0))


def test_one_file_beside_shards_is_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, sharded / "model.safetensors")
    refused(sharded, r"two sets of weights, model.safetensors and the 2 files that .*index.json names.*; keep one")


def test_an_index_that_names_the_one_file_is_no_second_set(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index(tmp_path, {"a": "model.safetensors"})
    assert torch.equal(open_weight_files(str(tmp_path)).read("a"), torch.ones(2))


def test_files_of_a_hub_cache_are_links(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        blob = tmp_path / "models--x" / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert torch.equal(open_weight_files(str(snapshot)).read("a"), torch.ones(2))
    next((tmp_path / "models--x" / "blobs").glob("1")).unlink()
    refused(snapshot, "lacks model-00002-of-00002.safetensors|lacks model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ([], "it holds no .safetensors weights"),
        (["pytorch_model.bin"], "pickled weights are never read .*; convert them to safetensors first"),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], "pickled weights are never read"),
        (["consolidated.00.pth"], "pickled weights are never read"),
        (["consolidated.safetensors"], r"consolidated.safetensors has other tensor names; download .*model\*"),
        (["model.fp16.safetensors"], "it has only model.fp16.safetensors; rename it to model.safetensors"),
        (["model.fp16-00001-of-00002.safetensors"], "it has only model.fp16-00001-of-00002.safetensors"),
        (["model-00001-of-00001.safetensors"], "shards without the index.*download model.safetensors.index.json"),
        (["model.Q4_1.gguf"], "GGUF weights are read where the file itself is named"),
        (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter .adapter_config.json. alone; merge"),
        (["adapter_config.json", "model.safetensors"], "a PEFT adapter .* beside whole weights; merge it"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_what_it_is(tmp_path: Path, present: list[str], words: str) -> None:
    for name in present:
        save_file({"a": torch.ones(2)}, tmp_path / name)
    refused(tmp_path, words)


def test_what_lies_beside_a_checkpoint_is_not_read(sharded: Path) -> None:
    wanted = {name: open_weight_files(str(sharded)).read(name) for name in "ab"}
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors", "x.safetensors"):
        save_file({"a": torch.zeros(2), "c": torch.zeros(2)}, sharded / name)
    # A shard of another save, which the index does not name: as transformers does, it is left alone.
    shard(sharded, 3, 3, a=torch.zeros(2), c=torch.zeros(2))
    (sharded / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    files = open_weight_files(str(sharded))
    assert sorted(files.names()) == ["a", "b"]
    assert all(torch.equal(files.read(name), tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda placed: {**placed, "b": "model-00003-of-00002.safetensors"}, "lacks model-00003-of-00002.safetensors"),
        (lambda placed: {**placed, "b": "../outside.safetensors"}, "'b' in '../outside.safetensors', which is no"),
        (lambda placed: {**placed, "b": "/etc/x.safetensors"}, "which is no safetensors file beside it"),
        (lambda placed: {**placed, "b": "sub/model.safetensors"}, "which is no safetensors file beside it"),
        (lambda placed: {**placed, "b": "pytorch_model.bin"}, "'pytorch_model.bin', which is no safetensors file"),
        (lambda placed: {**placed, "b": 3}, "'b' in '3', which is no"),
        (lambda placed: {**placed, "b": "a\0.safetensors"}, "which is no safetensors file"),
        (
            lambda placed: {"a": placed["b"], "b": placed["a"]},
            "places 'a' in model-00002.*, but it is in model-00001-of-00002.safetensors .2 such",
        ),
        (lambda placed: {**placed, "c": placed["a"]}, "places 'c' in model-00001.*, but it is not there .1 such"),
        (lambda placed: {}, "it has no weight_map"),
        (lambda placed: [], "it has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(sharded: Path, change: Any, words: str) -> None:
    placed = json.loads((sharded / INDEX).read_text())["weight_map"]
    save_file({"b": torch.zeros(3)}, sharded.parent / "outside.safetensors")
    index(sharded, change(placed))
    refused(sharded, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, "cannot read .*index.json: ")


def test_a_key_that_stands_twice_is_named(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    refused(sharded, "the key 'a' stands in it twice")
    (sharded / INDEX).write_bytes(b"\xff\xfe{")
    refused(sharded, "cannot read .*index.json: 'utf-8'")
    (sharded / INDEX).write_text("[" * 200_000)
    refused(sharded, "cannot read .*index.json: ")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    shard(sharded, 2, 2, a=torch.zeros(2), b=torch.zeros(3))
    refused(sharded, "tensor 'a' is in .*model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors")


def test_a_tensor_that_only_the_shard_knows_is_read(sharded: Path) -> None:
    shard(sharded, 2, 2, b=torch.full((3,), 2.0), c=torch.full((1,), 5.0))
    assert open_weight_files(str(sharded)).read("c").tolist() == [5.0]


# Headers.


def raw_file(path: Path, header: str | bytes, data: int = 8, length: int | None = None) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"t": entry(shape=(3,))}, r"'t' is F32 \[3\], 12 bytes, but its data_offsets span 8"),
        ({"t": entry(shape=(4,), offsets=(0, 16))}, "'t' does not fit in it: the data end at byte 8, it ends at 16"),
        ({"t": entry(offsets=(-8, 0))}, "no lists of sizes"),
        ({"t": entry(shape=(-2,), offsets=(8, 0))}, "no lists of sizes"),
        ({"t": entry(offsets=(8, 0))}, "its data_offsets span -8"),
        ({"t": entry(offsets=(0,))}, "no lists of sizes"),
        ({"t": entry(shape=(2.0,))}, "no lists of sizes"),
        ({"t": entry(shape=(True, 2))}, "no lists of sizes"),
        ({"t": entry(shape=None)}, "no lists of sizes"),
        ({"t": entry(shape=(10**30,))}, "a dimension beyond 2.63"),
        ({"t": entry(shape=(2**62, 2**62, 2**62))}, "but its data_offsets span 8"),
        ({"t": entry(shape=[1] * 65)}, "no lists of sizes"),
        ({"t": entry(dtype="F7")}, "'t' is of the unknown dtype 'F7'"),
        ({"t": entry(dtype=["F32"])}, "of the unknown dtype"),
        ({"t": entry(dtype="F4", shape=(1, 3), offsets=(0, 1))}, "'t' is F4"),
        ({"t": {"dtype": "F32", "shape": [2]}}, "'t' lacks dtype, shape or data_offsets"),
        ({"t": 3}, "'t' lacks dtype, shape or data_offsets"),
        (
            {"t": entry(), "u": entry()},
            "'u' overlaps the tensor before it: it begins at byte 0 of the data, expected 8",
        ),
        ({"t": entry(shape=(1,), offsets=(4, 8))}, "'t' leaves a gap before it: it begins at byte 4"),
        ({"t": entry(shape=(1,), offsets=(0, 4))}, "4 bytes follow the last tensor"),
        ({}, "8 bytes follow the last tensor"),
        ([], "its header is no JSON object"),
        ({"x" * 500: 3}, r"'xxx.*\.\.\.' lacks dtype"),
        ({"\ud800\n" + "x" * 500: entry()}, r"'\\ud800\\nxxx.* is no name of a tensor"),
        ({"__metadata__": {"format": 3}, "t": entry()}, "its __metadata__ are no texts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers_that_break_the_format_are_refused(tmp_path: Path, header: Any, words: str) -> None:
    """Whatever the library refuses, and nothing in the message that a terminal or a JSON file cannot take."""
    path = raw_file(tmp_path / "model.safetensors", json.dumps(header))
    refused(tmp_path, "no whole safetensors file: .*" + words)
    with pytest.raises((SafetensorError, OverflowError)):
        load_file(path)


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ("{}", 2**64 - 1, "its header claims 18446744073709551615 bytes; up to 25000000 are read"),
        ("{}", 25_000_001, "its header claims 25000001 bytes"),
        ("{}", 25_000_000, "its header is longer than the file"),
        ("{" * 8, None, "Expecting property name"),
        ("[" * 100_000, None, "recursion"),
        (b"\xff\xfe{}", None, "utf-8"),
        ('{"t": 1' + "0" * 5000 + "}", None, "integer"),
        (
            '{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "shape": [2]}}',
            None,
            "'shape' stands in it twice",
        ),
    ],
)
def test_headers_that_are_no_json_or_too_long_are_refused(tmp_path: Path, header: Any, length: Any, words: str) -> None:
    raw_file(tmp_path / "model.safetensors", header, length=length)
    refused(tmp_path, "no whole safetensors file: .*" + words)


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_files_are_refused_or_read_as_the_library_reads_them(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.ones(0, 2)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.sampled_from([b"0", b"9", b"-", b'"', b",", b"[", b"]", b"a", b"F", b"", b"\xff", b"\0", b"1e9"])
        )
        content[place : place + data.draw(st.integers(0, 4))] = piece
    path.write_bytes(content)
    try:
        files = open_weight_files(str(tmp_path))
    except UserError:
        return
    library = load_file(path)
    assert sorted(files.names()) == sorted(library)
    for name, tensor in library.items():
        assert torch.equal(files.read(name).nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_a_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"
    (tmp_path / "model.safetensors").write_text(text)
    refused(tmp_path, "the pointer that Git LFS leaves .*; run `git lfs pull`")


def test_headers_are_all_that_is_read(tmp_path: Path) -> None:
    """A file of 1 TiB, without its data: on disk it is a few kilobytes."""
    path = tmp_path / "model.safetensors"
    size = 2**40
    raw_file(path, json.dumps({"t": entry(dtype="BF16", shape=(2**39,), offsets=(0, size))}), data=0)
    os.truncate(path, path.stat().st_size + size)
    (found,) = read_headers(str(tmp_path)).values()
    assert found.shape == (2**39,)
    os.truncate(path, path.stat().st_size - 1)
    refused(tmp_path, "'t' does not fit in it")


# Hub ids.


class FakeHub:
    """A repository that is a folder; counts what is asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.downloaded, self.online = folder, list[str](), True

    def list_repo_files(self, repository: str, revision: str | None = None) -> list[str]:
        assert (repository, revision) == ("org/model", "abc")
        if not self.online:
            raise OfflineModeIsEnabled("offline")
        return [path.name for path in self.folder.iterdir()]

    def open(self, path: str, mode: str) -> Any:
        return (self.folder / path.removeprefix("org/model@abc/")).open(mode)

    def info(self, path: str) -> dict[str, int]:
        return {"size": (self.folder / path.removeprefix("org/model@abc/")).stat().st_size}

    def cached_file(self, repository: str, name: str, *, local_files_only: bool = False, **rest: Any) -> str | None:
        if local_files_only and name not in self.downloaded:
            return None
        if name not in self.downloaded:
            self.downloaded.append(name)
        return str(self.folder / name)


@pytest.fixture
def make_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], FakeHub]:
    def make(folder: Path) -> FakeHub:
        hub = FakeHub(folder)
        monkeypatch.setattr(checkpoint_files, "HfApi", lambda: hub)
        monkeypatch.setattr(checkpoint_files, "HfFileSystem", lambda: hub)
        monkeypatch.setattr(checkpoint_files, "cached_file", hub.cached_file)
        return hub

    return make


def test_of_a_hub_id_only_headers_are_fetched_to_look_at_it(sharded: Path, make_hub: Any) -> None:
    hub = make_hub(sharded)
    entries = read_headers("org/model", revision="abc", download=False)
    assert {name: found.shape for name, found in entries.items()} == {"a": (2,), "b": (3,)}
    assert hub.downloaded == [INDEX]
    assert torch.equal(open_weight_files("org/model", revision="abc").read("b"), torch.full((3,), 2.0))
    assert len(hub.downloaded) == 3


def test_a_hub_id_is_held_to_the_same_rules(sharded: Path, make_hub: Any) -> None:
    hub = make_hub(sharded)
    save_file({"a": torch.zeros(2)}, sharded / "model.safetensors")
    with pytest.raises(UserError, match="'org/model' holds two sets of weights"):
        find_weight_files("org/model", revision="abc")
    assert hub.downloaded == [INDEX]


def test_a_hub_id_without_a_network_is_what_the_cache_holds(sharded: Path, make_hub: Any) -> None:
    hub = make_hub(sharded)
    hub.online = False
    with pytest.raises(UserError, match="cannot list the files of 'org/model'"):
        find_weight_files("org/model", revision="abc")
    (sharded / "config.json").write_text("{}")
    hub.downloaded += [path.name for path in sharded.iterdir()]
    assert len(find_weight_files("org/model", revision="abc")) == 2
