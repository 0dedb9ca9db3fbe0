"""Model FLOP utilisation of a training job: what its steps had to compute (flops.py), as a share of the GPUs' peak."""

from __future__ import annotations

from typing import Any

import torch

from radlads.model.training.objectives import Objective
from radlads.tasks.contracts.recipe.training import Training, runs_teacher
from radlads.tasks.contracts.specs import TrainSpec
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.train.flops import count_multiplied, trained_matrices
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS, find_kind


class Utilisation:
    """Made before the engine takes the networks. Says nothing on a CPU, in fp32, and on a GPU of unknown peak."""

    def __init__(self, job: Job, spec: TrainSpec, objective: Objective) -> None:
        self._stage = spec.objective
        kind = find_kind(torch.cuda.get_device_name(job.device)) if job.device.type == "cuda" else None
        known = kind is not None and job.dtype == torch.bfloat16
        self._peak = GPU_KINDS[kind].peak_flops * job.world_size if kind is not None and known else None
        if known:
            student: Any = objective.student
            self._multiplied = count_multiplied(objective._teacher[0], student)
            self._trained = trained_matrices(student, objective.trainable)

    def of(self, part: Training, tokens_per_second: float) -> dict[str, float]:
        """{"mfu": share from 0 to 1} of a step in a part of the stage, or {}. tokens_per_second: of all processes."""
        if self._peak is None:
            return {}
        flops = self._multiplied.stage_flops(
            part.context,
            trained=self._trained,
            taught=runs_teacher(self._stage, part),
            layerwise=stage_info(self._stage).layerwise,
        )
        return {"mfu": flops.total * tokens_per_second / self._peak}
