"""Sheets of ours that somebody or something has altered: they are read, or refused in one line, and nothing else."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.names import parse_manifest
from radlads.tasks.jobs.checkpoints.checkpoint_sheet import Checkpoint
from radlads.tasks.jobs.checkpoints.state_slices import KINDS
from radlads.tasks.jobs.data.loader import TokenDataset, open_dataset

THOUSAND = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
ODD = st.sampled_from(
    ["", "..", "../x", "/etc/passwd", "a/../b", "a\\b", "a\0b", "a\nb", "\ud800", "x" * 2000, "manifest.json", "A", "a"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([-1, 0, 1 << 63, 10**4000, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | ODD, inner, max_size=3),
    max_leaves=6,
)

MANIFEST = {
    "schema_version": 1, "stage": "align", "digest": "d" * 64, "inputs": {"data": {"uri": "/s/d", "digest": "e" * 64}},
    "spec": {"a": [1, 2]}, "metrics": {"loss": 1.5}, "mlflow_run_id": None, "created_at": "2026-01-01T00:00:00Z",
    "code": {"sha": None, "dirty": False, "versions": {"torch": "2"}},
    "files": [
        {"path": "model/config.json", "size": 2, "sha256": "a" * 64, "stored_as": None},
        {"path": "model/weights.bin", "size": 5, "sha256": "b" * 64, "stored_as": ".objects/" + "b" * 64},
    ],
}  # fmt: skip
SHAPES = {"layer.weight": [2, 3], "layer.bias": [3]}
CHECKPOINT = {
    "version": 1, "step": 5, "adam_steps": 5, "seed": 1, "world_size": 1,
    "parameters": {"layer.weight": "state-00000.safetensors", "layer.bias": "state-00000.safetensors"},
}  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, from its root."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, below in inner for place in places(below, (*at, key)))]


@st.composite
def altered(draw: st.DrawFn, document: dict[str, Any]) -> bytes:
    """The document with some of its values replaced, removed, added or repeated; then perhaps some of its bytes."""
    made: Any = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(made)))
        if not place:
            continue
        *path, last = place
        holder = made
        for key in path:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace":
            holder[last] = draw(VALUES)
        elif how == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=4) | ODD)] = draw(VALUES)
        else:
            holder.append(copy.deepcopy(holder[last]))
    data = bytearray(json.dumps(made).encode())
    for _ in range(draw(st.integers(0, 2))):
        where = draw(st.integers(0, len(data)))
        data[where : where + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


def check_line(error: Exception) -> None:
    line = str(error)
    assert line.isprintable(), ascii(line)
    assert len(line) < 2000


@THOUSAND
@given(altered(MANIFEST))
def test_a_thousand_manifests(data):
    try:
        manifest = parse_manifest(data)
    except StoreError as error:
        check_line(error)
        return
    for entry in manifest.files:
        path = Path("/top", entry.path)
        assert path.resolve() == path
        assert path.is_relative_to("/top")
        assert entry.stored_as is None or entry.stored_as.startswith(".objects/")
    assert len({entry.path.casefold() for entry in manifest.files}) == len(manifest.files)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["../x"], "not a valid key"),
        (["/etc/passwd"], "not a valid key"),
        (["a\\..\\b"], "not a valid key"),
        (["a\0"], "not a valid key"),
        (["a", "a"], "one file"),
        (["Model/x", "model/X"], "one file"),
        (["u\u0308", "ü"], "one file"),
        (["a", "a/b"], "a file and a folder"),
        (["manifest.json"], "reserved for the store"),
    ],
)
def test_paths_that_no_product_has(files, words):
    entries = [{"path": path, "size": 1, "sha256": "a" * 64} for path in files]
    with pytest.raises(StoreError, match=words) as said:
        parse_manifest(json.dumps({**MANIFEST, "files": entries}).encode())
    check_line(said.value)


@pytest.mark.parametrize("stored_as", ["../weights.bin", "model/config.json", "/etc/passwd", ".objects/../x"])
def test_a_file_is_stored_under_its_name_or_with_the_objects(stored_as):
    entry = {"path": "x", "size": 1, "sha256": "a" * 64, "stored_as": stored_as}
    with pytest.raises(StoreError, match=r"not under \.objects|not a valid key"):
        parse_manifest(json.dumps({**MANIFEST, "files": [entry]}).encode())


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"null"])
def test_what_is_no_document_at_all(data, tmp_path):
    with pytest.raises(StoreError) as manifest:
        parse_manifest(data)
    check_line(manifest.value)
    for name, open_it in (("index.json", open_dataset), ("checkpoint.json", lambda f: Checkpoint(f, 5, SHAPES))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as said:
            open_it(tmp_path)
        check_line(said.value)


# checkpoint.json


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """A whole checkpoint's folder."""
    folder = Path(tempfile.mkdtemp(prefix="radlads-checkpoint-"))
    write_states(folder)
    return folder


def write_states(folder: Path, **changes: torch.Tensor) -> None:
    tensors = {f"{kind}/{name}": torch.zeros(shape) for name, shape in SHAPES.items() for kind in KINDS}
    save_file(tensors | changes, folder / "state-00000.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps(CHECKPOINT))


@pytest.mark.parametrize("key", ["version", "step", "parameters"])
def test_what_is_very_long_is_told_in_a_line(checkpoint, key):
    long = {**CHECKPOINT, key: {"layer.weight": [1] * 5000, "layer.bias": [1]} if key == "parameters" else 10**4000}
    (checkpoint / "checkpoint.json").write_text(json.dumps(long))
    with pytest.raises(UserError) as said:
        Checkpoint(checkpoint, 5, SHAPES)
    check_line(said.value)


@THOUSAND
@given(data=altered(CHECKPOINT))
def test_a_thousand_checkpoints(checkpoint, data):
    (checkpoint / "checkpoint.json").write_bytes(data)
    try:
        with Checkpoint(checkpoint, 5, SHAPES) as opened:
            sheet = opened.sheet
    except UserError as error:
        check_line(error)
        return
    assert sheet.step == 5
    assert set(sheet.parameters.values()) == {"state-00000.safetensors"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"param/layer.bias": torch.zeros(1)}, r"param of layer.bias is F32 \[1\], expected F32 \[3\]"),
        ({"exp_avg/layer.weight": torch.zeros(3, 2)}, r"exp_avg of layer.weight is F32 \[3, 2\]"),
        ({"exp_avg_sq/layer.bias": torch.zeros(3, dtype=torch.bfloat16)}, "is BF16"),
    ],
)
def test_a_tensor_that_would_only_be_broadcast_is_refused(tmp_path, change, words):
    write_states(tmp_path, **change)
    with pytest.raises(UserError, match=words):
        Checkpoint(tmp_path, 5, SHAPES)


@pytest.mark.parametrize("damage", ["no file", "torn", "a tensor less", "no sheet"])
def test_a_checkpoint_that_lacks_something(tmp_path, damage):
    write_states(tmp_path)
    states = tmp_path / "state-00000.safetensors"
    if damage == "no file":
        states.unlink()
    elif damage == "torn":
        states.write_bytes(states.read_bytes()[:-1])
    elif damage == "a tensor less":
        save_file({"param/layer.bias": torch.zeros(3)}, states)
    else:
        (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(UserError, match="cannot be resumed") as said:
        Checkpoint(tmp_path, 5, SHAPES)
    check_line(said.value)


def test_the_whole_one_is_read(tmp_path):
    write_states(tmp_path)
    with Checkpoint(tmp_path, 5, SHAPES) as opened:
        assert opened.sheet.adam_steps == 5


# index.json


@pytest.fixture(scope="module")
def dataset() -> tuple[Path, dict[str, Any]]:
    """A whole dataset's folder and its index."""
    folder = Path(tempfile.mkdtemp(prefix="radlads-dataset-"))
    splits: dict[str, Any] = {}
    for split in ("train", "heldout"):
        np.arange(10, dtype="<u2").tofile(folder / f"{split}-0.bin")
        np.zeros(1, dtype="<u8").tofile(folder / f"{split}-boundaries.bin")
        splits[split] = {
            "shards": [{"file": f"{split}-0.bin", "tokens": 10}], "mask_files": [], "tokens": 10, "documents": 1,
            "bytes": 20, "boundaries_file": f"{split}-boundaries.bin",
        }  # fmt: skip
    index = {
        "dtype": "uint16", "eos_id": 0, "bos_id": None, "add_bos": False, "vocab_size": 99, "has_mask": False,
        "shard_tokens": 10, "tokenizer_fingerprint": "f" * 64, "splits": splits,
    }  # fmt: skip
    return folder, index


@THOUSAND
@given(data=st.data())
def test_a_thousand_indexes(dataset, data):
    folder, index = dataset
    (folder / "index.json").write_bytes(data.draw(altered(index)))
    try:
        opened = open_dataset(folder)
    except UserError as error:
        check_line(error)
        return
    assert isinstance(opened, TokenDataset)
    for split in opened.splits.values():
        assert all(Path(name).name == name for name in split.shard_files)
