"""train.json and the record in a training job's product: time, memory and final metrics."""

from __future__ import annotations

import resource
import shutil
from typing import Any

import torch

from radlads.tasks.contracts.events import events_of
from radlads.tasks.contracts.specs import TrainSpec
from radlads.tasks.jobs.common import Job, NoRecord, write_json


def write_report(job: Job, spec: TrainSpec, heldout: dict[str, float]) -> dict[str, Any]:
    """Put train.json and metrics.jsonl into the output; returns the numbers for the manifest. The first rank calls it.

    Seconds are the training steps' own, over every attempt of the job, with those that a rollback gave up; without
    start-up and saving.
    """
    section, resources = spec.section, job.spec.resources
    record = job.record
    assert not isinstance(record, NoRecord), "the first rank keeps the record"
    rows = record.rows()
    steps = [row for row in rows if "loss" in row and "seconds" in row]
    events = events_of(rows)
    seconds = sum(row["seconds"] for row in steps) + sum(event.seconds for event in events)
    tokens = section.seen_tokens
    gpu_hours = seconds * job.world_size / 3600 if resources.device == "cuda" else 0.0
    numbers: dict[str, Any] = {
        "steps": section.num_steps,
        "tokens": tokens,
        "loss": steps[-1]["loss"],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "memory_bytes": memory_bytes(job.device),
        "gpu_hours": gpu_hours,
    }
    if resources.dollars_per_gpu_hour is not None:
        numbers["dollars"] = gpu_hours * resources.dollars_per_gpu_hour
    if events:
        numbers["rollbacks"] = sum(event.action == "rollback" for event in events)
        numbers["events"] = [event.model_dump(mode="json") for event in events]
    report = {
        "objective": spec.objective,
        **numbers,
        **heldout,
        "first_loss": steps[0]["loss"],
        "losses": [[row["step"], row["loss"]] for row in steps],
        "heldout_losses": [[row["step"], row["heldout/loss"]] for row in rows if "heldout/loss" in row],
        "device": torch.cuda.get_device_name(job.device) if resources.device == "cuda" else "cpu",
        "processes": job.world_size,
        "dtype": str(job.dtype).removeprefix("torch."),
    }
    write_json(job.output / "train.json", report)
    shutil.copyfile(record.path, job.output / "metrics.jsonl")
    return numbers


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the device, or, on a CPU, resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
