"""The engine of a job's ZeRO stage."""

from __future__ import annotations

from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.engines.sharded_engine import ShardedEngine

NO_OFFLOAD = (
    "zero_stage: 3 divides the optimizer over the GPUs, offload_optimizer moves it to host memory: set one of the two"
)
NO_CALIBRATION = "calibration needs whole networks, and resources.zero_stage: 3 divides them; drop one of the two"


def build_engine(job: Job, objective: Any, section: Training, *, micro_batch: int, num_micro: int) -> Engine:
    """The engine that trains an objective: DeepSpeed's under ZeRO-0 to 2, torch's partitioning under ZeRO-3. Raises
    UserError for settings that exclude each other."""
    resources, sizes = job.spec.resources, {"micro_batch": micro_batch, "num_micro": num_micro}
    if resources.zero_stage == 3:
        if resources.offload_optimizer:
            raise UserError(f"resources: {NO_OFFLOAD}")
        return ShardedEngine(objective, section, device=job.device, dtype=job.dtype, **sizes)
    return Engine(
        objective,
        section,
        device=job.device,
        dtype=job.dtype,
        zero_stage=resources.zero_stage,
        offload=resources.offload_optimizer,
        **sizes,
    )
