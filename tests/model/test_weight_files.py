"""Safetensors, one tensor at a time: as the library writes and reads them, and nothing half-written."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from radlads.model.weights.weight_files import WeightWriter, open_weight_files
from radlads.tasks.contracts.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    shapes = [(5, 3), (7,), (2, 3, 4), (), (0, 4), (1, 9), (4, 4)]
    return {f"t{i}": torch.randn(shape).mul(9).to(DTYPES[i]) for i, shape in enumerate(shapes)}


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    writer = WeightWriter(folder, layout, max_shard_bytes=max_shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def test_the_library_reads_what_is_written(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write(tmp_path, tensors, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(loaded[n].dtype == t.dtype and torch.equal(loaded[n], t) for n, t in tensors.items())


def test_what_the_library_writes_is_read_whole_and_by_rows(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = open_weight_files(str(tmp_path))
    assert sorted(files.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        read = files.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape) == (files.dtype(name), files.shape(name))
        assert torch.equal(read, tensor)
    assert torch.equal(files.read("t0", 1, 4), tensors["t0"][1:4])
    assert torch.equal(files.read("t2", 1), tensors["t2"][1:])


def test_shards_hold_what_fits_and_the_index_comes_last(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10) for i in range(7)}
    tensors["large"] = torch.randn(50)
    write(tmp_path, tensors, 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == 480
    assert sorted({*index["weight_map"].values()}) == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    files = open_weight_files(str(tmp_path))
    assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())


def test_nothing_half_written_looks_like_a_model(tmp_path: Path) -> None:
    layout = {f"t{i}": (torch.float32, (10,)) for i in range(4)}
    writer = WeightWriter(tmp_path, layout, max_shard_bytes=80)
    for i in range(3):
        writer.write(f"t{i}", torch.randn(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors.partial",
    ]
    with pytest.raises(ValueError, match="t3 was never written"):
        writer.close()
    writer.abandon()
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        open_weight_files(str(tmp_path))
    write(tmp_path, {"t": torch.ones(3)}, 80)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_writer_takes_its_tensors_in_order_and_in_shape(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    writer = WeightWriter(tmp_path, layout, max_shard_bytes=80)
    with pytest.raises(ValueError, match="got b"):
        writer.write("b", torch.ones(3))
    with pytest.raises(ValueError, match=r"expected a"):
        writer.write("a", torch.ones(3))
    writer.write("a", torch.ones(2, dtype=torch.float64))
    writer.write("b", torch.ones(3, 1)[:, 0])
    writer.close()
    with pytest.raises(ValueError, match="got a"):
        writer.write("a", torch.ones(2))
    assert load_file(tmp_path / "model.safetensors")["a"].dtype == torch.float32


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, whole)
    content = whole.read_bytes()
    for damaged in (content[:-1], content[:20], b"", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"no json!"):
        whole.write_bytes(damaged)
        with pytest.raises(UserError, match="no whole safetensors file") as caught:
            open_weight_files(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_file_that_the_index_lists_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, {f"t{i}": torch.randn(10) for i in range(4)}, 80)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002"):
        open_weight_files(str(tmp_path))


def test_mapped_tensors_are_the_file_s_until_they_are_written_to(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = open_weight_files(str(tmp_path))
    for name, tensor in tensors.items():
        mapped = files.map(name)
        assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(mapped, tensor)
        if mapped.numel():
            mapped.zero_()
            assert torch.equal(files.read(name), tensor)


def test_what_lies_between_two_numbers_is_read_instead(tmp_path: Path) -> None:
    """A header of odd length, which the format allows, moves every tensor off its place."""
    save_file({"t": torch.arange(6.0)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    mapped = open_weight_files(str(tmp_path)).map("t")
    assert mapped.data_ptr() % 4 == 0
    assert mapped.tolist() == list(range(6))
