"""A checkpoint in parts in a bucket, here because this folder's tests share the servers."""

import torch

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.s3.store import S3Store

from ..jobs.test_checkpoint_parts import KINDS, Table, one_attempt, pair, restore, save, whole_state  # noqa: F401


def test_two_ranks_write_it_and_three_read_it(tmp_path, moto_endpoint):
    ref = StoreRef(uri="s3://art/checkpoint-parts", endpoint_url=moto_endpoint)
    for step in (1, 2, 3):
        save(tmp_path, ref, pair(), step)
    kept = S3Store(ref).list("product/checkpoints")
    assert sorted(key.split("/")[2] for key in kept if key.endswith("manifest.json")) == ["step-000002", "step-000003"]
    assert len(kept) == 1 + 2 * 4
    back = [Table(rank, 3, "partitions") for rank in range(3)]
    assert restore(tmp_path, ref, back) == [3, 3, 3]
    for table in back:
        for one in table.held_state():
            wanted = whole_state()[one.name]
            assert all(torch.equal(one.tensors[k], wanted[k][one.start : one.start + one.numel]) for k in KINDS)
