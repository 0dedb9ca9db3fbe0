"""The loader: every row once an epoch, the same batches after a restart and for any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.batch_plan import BatchPlan
from radlads.tasks.jobs.data.loader import DatasetError, open_dataset
from radlads.tasks.jobs.data.permutation import permute

SHARD = 50


def write_dataset(folder: Path, tokens: int = 203, *, dtype: str = "uint16", mask: bool = False) -> Path:
    """A dataset whose token i is i (so that every batch can be read off), documents of 30 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    numpy_dtype = {"uint16": "<u2", "uint32": "<u4"}[dtype]
    index = {"dtype": dtype, "eos_id": 0, "bos_id": None, "vocab_size": 1 << 16, "has_mask": mask, "splits": {}}
    for split, count in (("train", tokens), ("heldout", 61)):
        stream = np.arange(count, dtype=numpy_dtype)
        starts = np.arange(0, count, 30, dtype="<u8")
        starts.tofile(folder / f"{split}-boundaries.bin")
        shards, masks = [], []
        for number, begin in enumerate(range(0, count, SHARD)):
            piece = stream[begin : begin + SHARD]
            piece.tofile(folder / f"{split}-{number:05d}.bin")
            shards.append({"file": f"{split}-{number:05d}.bin", "tokens": len(piece)})
            if mask:
                (piece % 2).astype(np.uint8).tofile(folder / f"{split}-mask-{number:05d}.bin")
                masks.append(f"{split}-mask-{number:05d}.bin")
        index["splits"][split] = {
            "shards": shards,
            "mask_files": masks,
            "tokens": count,
            "documents": len(starts),
            "bytes": count * 4,
            "boundaries_file": f"{split}-boundaries.bin",
        }
    index["tokenizer_fingerprint"] = "f" * 64
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    return open_dataset(write_dataset(tmp_path_factory.mktemp("dataset")))


def test_rows_overlap_by_one_token_and_cross_shards(dataset):
    train = dataset.split("train")
    assert train.rows(16) == 12
    batch = train.batch([0, 3, 11], 16)
    assert batch["input_ids"].dtype == torch.int64
    for row, number in zip(batch["input_ids"], (0, 3, 11), strict=True):
        assert row.tolist() == list(range(number * 16, number * 16 + 17))
    with pytest.raises(IndexError):
        train.batch([12], 16)


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_permutation_is_one(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_orders_differ_by_seed_and_epoch():
    orders = {tuple(permute(np.arange(40), 40, seed, epoch)) for seed in (1, 2, 3) for epoch in (0, 1, 2)}
    assert len(orders) == 9


def test_the_order_is_the_same_on_every_machine():
    assert permute(np.arange(10), 10, 1, 0).tolist() == [0, 2, 6, 7, 9, 4, 8, 5, 3, 1]


@given(
    context=st.integers(2, 40),
    share=st.integers(1, 4),
    micro=st.integers(1, 8),
    world=st.integers(1, 4),
    seed=st.integers(0, 99),
    start=st.integers(0, 30),
)
@settings(max_examples=60, deadline=None)
def test_resumed_at_any_step_and_on_any_world_size_the_batches_are_the_same(
    dataset, context, share, micro, world, seed, start
):
    batch = share * world
    train = dataset.split("train")
    alone = BatchPlan(train, context, batch, micro, seed)
    shared = BatchPlan(train, context, batch, micro, seed, world)
    for step in range(start, start + 3):
        expected = train.batch(alone.rows(step), context)["input_ids"]
        for plan in (alone, shared):
            parts = [
                plan.micro(step, rank, index)["input_ids"]
                for index in range(plan.num_micro)
                for rank in range(plan.world_size)
            ]
            assert all(len(part) <= micro for part in parts)
            assert torch.equal(torch.cat(parts), expected)


def test_an_epoch_sees_every_row_once_and_the_next_in_another_order(dataset):
    plan = BatchPlan(dataset.split("train"), 16, 5, 5, seed=3)
    stream = np.concatenate([plan.rows(step) for step in range(12)])
    first, second = stream[:12], stream[12:24]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory):
    """The train split of a second, smaller dataset."""
    return open_dataset(write_dataset(tmp_path_factory.mktemp("other"), 70)).split("train")


@pytest.mark.parametrize(("share", "expected"), [(0.1, 20), (0.25, 50), (1 / 3, 66), (0.0001, 0)])
def test_exactly_the_share_is_mixed_in_and_evenly(dataset, other, share, expected):
    plan = BatchPlan(dataset.split("train"), 16, 5, 5, seed=3, mixed=other, share=share)
    mixed = np.concatenate([plan.rows(step) for step in range(40)]) >= 12
    assert mixed.sum() == expected
    assert np.abs(np.cumsum(mixed) - share * np.arange(1, 201)).max() <= 1


def test_each_dataset_keeps_its_own_order_where_rows_are_mixed(dataset, other):
    train = dataset.split("train")
    plan = BatchPlan(train, 16, 4, 4, seed=3, mixed=other, share=0.25)
    rows = np.concatenate([plan.rows(step) for step in range(16)])
    alone = np.concatenate([BatchPlan(train, 16, 4, 4, seed=3).rows(step) for step in range(12)])
    assert rows[rows < 12].tolist() == alone.tolist()
    theirs = np.concatenate([BatchPlan(other, 16, 4, 4, seed=3).rows(step) for step in range(4)])
    assert (rows[rows >= 12] - 12).tolist() == theirs.tolist()


@given(
    share=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    micro=st.integers(1, 4),
    world=st.integers(1, 3),
    start=st.integers(0, 30),
    skip=st.integers(0, 7),
)
@settings(max_examples=40, deadline=None)
def test_mixed_batches_depend_on_the_step_alone(dataset, other, share, micro, world, start, skip):
    train, count = dataset.split("train"), 12
    plan = BatchPlan(train, 16, 6, micro, 1, world, skip=skip, mixed=other, share=share, document_ids=True)
    whole = BatchPlan(train, 16, 1, 1, 1, mixed=other, share=share)
    for step in range(start, start + 2):
        rows = plan.rows(step)
        assert rows.tolist() == [int(whole.rows(skip + step * 6 + place)[0]) for place in range(6)]
        expected = [train.batch([r], 16) if r < count else other.batch([r - count], 16) for r in rows]
        parts = [plan.micro(step, rank, index) for index in range(plan.num_micro) for rank in range(world)]
        read = torch.cat([part["input_ids"] for part in parts])
        assert torch.equal(read, torch.cat([one["input_ids"] for one in expected]))
        assert all(part.keys() == {"input_ids", "document_ids"} for part in parts)


def test_rows_without_masks_count_wholly_beside_masked_ones(tmp_path, other):
    train = open_dataset(write_dataset(tmp_path, mask=True)).split("train")
    plan = BatchPlan(train, 16, 4, 4, seed=3, mixed=other, share=0.5)
    batch, rows = plan.micro(0, 0, 0), plan.rows(0)
    assert batch["loss_mask"][:, 1:].sum(1).tolist() == plan.labels()[rows].tolist()
    assert sorted(set(plan.labels()[rows].tolist())) == [8, 16]
    masked = open_dataset(tmp_path).split("train")
    plain = BatchPlan(other, 16, 4, 4, seed=3, mixed=masked, share=0.5)
    assert "loss_mask" not in plain.micro(0, 0, 0)


def test_a_mixed_in_dataset_without_one_row_is_named(dataset, other):
    with pytest.raises(DatasetError, match="split of the mixed-in dataset has 70 tokens, fewer than one row"):
        BatchPlan(dataset.split("train"), 100, 4, 4, seed=3, mixed=other, share=0.5)


def test_masks_and_documents_follow_the_tokens(tmp_path):
    train = open_dataset(write_dataset(tmp_path, dtype="uint32", mask=True)).split("train")
    batch = train.batch([2], 25, document_ids=True)
    assert batch["loss_mask"][0].tolist() == [token % 2 == 1 for token in range(50, 76)]
    assert batch["document_ids"][0].tolist() == [token // 30 for token in range(50, 76)]


def test_heldout_is_shared_out_whole(dataset):
    heldout = dataset.split("heldout")
    parts = [batch["input_ids"] for rank in range(3) for batch in heldout.heldout(10, 2, 45, rank=rank, world_size=3)]
    assert sorted(int(row[0]) for part in parts for row in part) == [0, 10, 20, 30]
    assert len(list(heldout.heldout(10, 2, 1))) == 1


def test_a_batch_that_cannot_be_shared_is_refused(dataset):
    with pytest.raises(UserError, match=r"batch \(5\) must be a multiple of the number of processes \(2\)"):
        BatchPlan(dataset.split("train"), 16, 5, 1, seed=0, world_size=2)


def test_too_little_data_is_refused(dataset):
    with pytest.raises(DatasetError, match="fewer than one row of context 4096"):
        BatchPlan(dataset.split("train"), 4096, 1, 1, seed=0)


@pytest.mark.parametrize("damage", ["torn index", "no index", "short shard", "missing shard", "wrong total"])
def test_a_damaged_dataset_is_told_in_one_line(tmp_path, damage):
    folder = write_dataset(tmp_path)
    index = folder / "index.json"
    if damage == "torn index":
        index.write_text(index.read_text()[:200])
    elif damage == "no index":
        index.unlink()
    elif damage == "short shard":
        (folder / "train-00001.bin").write_bytes(b"12")
    elif damage == "missing shard":
        (folder / "heldout-00000.bin").unlink()
    else:
        index.write_text(index.read_text().replace('"tokens": 203', '"tokens": 204'))
    with pytest.raises(DatasetError) as told:
        open_dataset(folder)
    assert str(folder) in str(told.value)
    assert "\n" not in str(told.value)
