"""Sequence parallelism: rows that ranks share are trained on as by one rank."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from radlads.model.sequence_parallel.limits import sharing_fault
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Rate
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data.batch_plan import division_fault, part_of, plan_batches
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.train import train

RANK = Path(__file__).with_name("row_ranks.py")
LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}
RATES = {"mixer_rate": Rate(start=3e-3, final=1e-3), "rest_rate": Rate(start=1e-3, final=1e-4)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_one_rank(job_python: Any, ranks: int) -> None:
    """Cases are in row_ranks.py: mixers of three recurrences, kept layers, documents across the ranks' borders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    programs = [job_python.start(str(RANK), env=shared | {"RANK": str(rank)}) for rank in range(ranks)]
    codes = [program.wait() for program in programs]
    assert codes == [0] * ranks, [program.output[-3000:] for program in programs]


def losses(job: Job) -> list[float]:
    """The curve, and the held-out loss at its end."""
    rows = [json.loads(line) for line in (job.scratch / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "heldout/loss") if name in row]


@pytest.mark.parametrize(("processes", "zero_stage"), [(4, 2), (2, 3)])
def test_a_stage_trains_as_on_one_rank(
    training: Any, run_ranks: Callable[..., None], processes: int, zero_stage: int
) -> None:
    """On four ranks there are two groups, with rows of their own."""
    options = {"tokens": 5 * 128, "micro_batch": 1, "reset_at_documents": zero_stage == 2, **RATES}
    one = training.job("distill", f"whole-rows-{zero_stage}", resources={"zero_stage": 2}, **options)
    assert execute(train.main, one) == "done", training.ending(one)
    resources = {"processes": processes, "zero_stage": zero_stage}
    several = training.job(
        "distill", f"shared-rows-{zero_stage}", resources=resources, sequence_parallel=2,
        gradient_checkpointing=zero_stage == 3, **options,
    )  # fmt: skip
    assert several.spec.digest == one.spec.digest
    run_ranks("radlads.tasks.jobs.train.train", several, processes)
    wanted = losses(one)
    assert losses(several) == pytest.approx(wanted, rel=2e-5)
    assert len(wanted) == 6
    assert wanted[0] != pytest.approx(wanted[4], rel=1e-2), "something was learnt"


def test_groups_read_the_rows_of_a_step_once_and_parts_overlap_by_one_label(training: Any) -> None:
    split = open_dataset(training.root / "data").split("train")
    section = Distill(tokens=999, context=32, batch=4, micro_batch=2, sequence_parallel=4, reset_at_documents=True)
    shared = plan_batches(section, split, 8)[0]
    assert (shared.groups, shared.sequences, shared.num_micro) == (2, 2, 1)
    one = plan_batches(section.model_copy(update={"sequence_parallel": 1}), split, 2)[0]
    for rank in range(8):
        group, place = divmod(rank, 4)
        found, row = shared.micro(3, rank, 0), one.micro(3, group, 0)
        assert torch.equal(found["input_ids"], row["input_ids"][:, 8 * place : 8 * place + 9])
        assert torch.equal(found["document_ids"], row["document_ids"])


def test_masks_are_cut_with_the_tokens() -> None:
    tokens = torch.arange(18).view(2, 9)
    parts = [part_of({"input_ids": tokens, "loss_mask": tokens > 4}, place, 2) for place in range(2)]
    assert torch.cat([part["input_ids"][:, :-1] for part in parts], 1).equal(tokens[:, :-1])
    assert torch.cat([part["loss_mask"][:, 1:] for part in parts], 1).equal((tokens > 4)[:, 1:])


@pytest.mark.parametrize(
    ("batch", "processes", "sharing", "told"),
    [
        (8, 6, 4, "sequence_parallel (4) must divide the number of processes (6)"),
        (9, 8, 2, "batch (9) must be a multiple of the number of processes (8) / sequence_parallel (2)"),
    ],
)
def test_what_cannot_be_divided_is_told(batch: int, processes: int, sharing: int, told: str) -> None:
    assert told in (division_fault(batch, processes, sharing) or "")
    assert division_fault(8, 8, 2) is None


def test_sections_say_what_they_exclude() -> None:
    with pytest.raises(ValidationError, match=r"context \(33\) must be a multiple of sequence_parallel \(2\)"):
        Distill(tokens=99, context=33, batch=1, sequence_parallel=2)
    with pytest.raises(ValidationError, match="align compares outputs over whole rows"):
        Align(tokens=99, context=32, batch=1, sequence_parallel=2)


@pytest.mark.parametrize(
    ("model_type", "changes", "layers", "told"),
    [
        ("qwen3", {}, (0,), None),
        ("qwen3", {"num_attention_heads": 6}, (0,), "4 processes cannot divide the 6 heads of softmax attention"),
        ("qwen3", {"num_attention_heads": 6}, (), None),
        ("mistral", {"sliding_window": 16}, (0,), "a window of 16 tokens"),
        ("mistral", {"sliding_window": 64}, (0,), None),
        ("qwen3_5_text", {}, (), "linear attention in the teacher already"),
        ("phi3", LONGROPE, (), "rotary positions (longrope) depend on the length"),
    ],
)
def test_networks_that_cannot_share_rows_are_told(
    family_config: Callable[..., Any], model_type: str, changes: dict[str, Any], layers: tuple[int, ...], told: str
) -> None:
    fault = sharing_fault(family_config(model_type, **changes), layers, 4, context=32)
    assert fault is None if told is None else told in (fault or "")


def test_a_job_tells_before_it_trains(training: Any, run_ranks: Callable[..., None]) -> None:
    job = training.job("distill", "shared-by-three", resources={"processes": 3}, context=33, sequence_parallel=3)
    run_ranks("radlads.tasks.jobs.train.train", job, 3, code=2)
    assert "3 processes cannot divide the 4 heads" in training.ending(job)["message"]
