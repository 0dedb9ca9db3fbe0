"""The engine of a job: of its ZeRO stage, or the one that records passes as CUDA graphs."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from radlads.model.training.quantized import num_weights
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.train.engines.deepspeed_config import usable_stage
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.engines.pass_graphs import PassRecorder
from radlads.tasks.jobs.train.engines.replicated_engine import ReplicatedEngine
from radlads.tasks.jobs.train.engines.sharded_engine import ShardedEngine

logger = logging.getLogger("radlads")

SMALL = 10**9
"""Parameters of a student up to which launches, not arithmetic, are assumed to take the time (`cuda_graphs: auto`)."""
NO_OFFLOAD = (
    "zero_stage: 3 divides the optimizer over the GPUs, offload_optimizer moves it to host memory: set one of the two"
)
NO_CALIBRATION = "calibration needs whole networks, and resources.zero_stage: 3 divides them; drop one of the two"


def build_engine(job: Job, objective: Any, section: Training, *, micro_batch: int, num_micro: int) -> Engine:
    """The engine that trains an objective: torch's partitioning under ZeRO-2 and 3, DeepSpeed's below and with the
    optimizer in host memory, whole replicas for CUDA graphs. Raises UserError for settings that exclude each other."""
    resources = job.spec.resources
    sizes: dict[str, Any] = {"micro_batch": micro_batch, "num_micro": num_micro}
    strict, reason = resources.cuda_graphs == "on", why_not_recorded(section, resources)
    if strict and reason is not None:
        raise UserError(f"resources.cuda_graphs: {reason}")
    if records_passes(section, resources, num_weights(objective.student)):
        logger.info("passes are recorded as CUDA graphs; every GPU holds the whole optimizer")
        recorder = partial(PassRecorder, job.device)
        return ReplicatedEngine(
            objective, section, device=job.device, dtype=job.dtype, make_recorder=recorder, strict=strict, **sizes
        )
    if resources.cuda_graphs == "auto":
        logger.info("no CUDA graphs: %s", reason or "the student has more than a billion parameters")
    if resources.offload_optimizer:
        if resources.zero_stage == 3:
            raise UserError(f"resources: {NO_OFFLOAD}")
        return Engine(objective, section, device=job.device, dtype=job.dtype, zero_stage=2, offload=True, **sizes)
    stage = usable_stage(resources.zero_stage, job.dtype)
    if stage >= 2:
        once = stage == 2
        return ShardedEngine(objective, section, device=job.device, dtype=job.dtype, gathered_once=once, **sizes)
    return Engine(objective, section, device=job.device, dtype=job.dtype, zero_stage=stage, **sizes)


def why_not_recorded(section: Training, resources: JobResources) -> str | None:
    """Why a stage's passes cannot be recorded as CUDA graphs, in one line that says what to change; None: they can."""
    if resources.device != "cuda":
        return "only a GPU can replay passes, and this runs on a CPU; set it to auto or off"
    if resources.zero_stage == 3:
        return "zero_stage: 3 gathers weights in each pass, which cannot be recorded; set one of the two"
    if resources.offload_optimizer:
        return "with offload_optimizer each pass copies gradients to the host; set one of the two"
    if any(part.reset_at_documents for part in section.parts):
        return "reset_at_documents gives each pass another number of documents; set it to auto or off"
    if section.sequence_parallel > 1:
        return "sequence_parallel exchanges between GPUs in each pass, which is not recorded; set one of the two"
    terms: Any = getattr(section, "comprehensive", None) if getattr(section, "loss", "") == "comprehensive" else None
    if terms is not None and terms.revision == "svd" and terms.spectral:
        return "comprehensive.revision svd waits for the GPU in each pass; set it to auto or off"
    return None


def records_passes(section: Training, resources: JobResources, parameters: int) -> bool:
    """Whether a stage's passes are recorded as CUDA graphs. parameters: of the student."""
    wanted = resources.cuda_graphs == "on" or (resources.cuda_graphs == "auto" and parameters <= SMALL)
    return wanted and why_not_recorded(section, resources) is None
