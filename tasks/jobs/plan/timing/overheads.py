"""Seconds of a stage besides its computation: start, weights read, held-out passes, checkpoints, the model written.

Rates are rough: start-up is of benchmarks/results/training_h100.md and training_h100_4gpus.md (31 GB of weights in
13 s, from files in memory), 6 to 11 s are of models of 1.3 and 2.4 GB through export, hash and store
(recipes_gpu_h100.md); those marked so are assumed. A store on a slow network takes longer.
"""

from __future__ import annotations

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.training import Training, runs_teacher
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.jobs.plan.memory import NetworkSizes
from radlads.tasks.jobs.plan.timing.passes import Device

_START = {"cuda": 10.0, "cpu": 12.0}  # from the launch until weights are read: imports, and ranks that meet
_COMPILE = {"cuda": 20.0, "cpu": 0.0}  # kernels at the first step: 16 to 26 s, then kept in the work folder
_LIGHT_START = 4.0  # of a program on the CPU, for plan, tokenize and publish
_READ = {"cuda": 2.0e9, "cpu": 1.0e9}  # bytes/s of weights, from files to the device
_WRITE = 0.4e9  # bytes/s of a model, exported, hashed and stored
_COPY = {"cuda": 10e9, "cpu": 0.85e9}  # bytes/s of a checkpoint's copy to host memory; assumed for GPUs
_PIN = {"cuda": 1.0e9, "cpu": 0.15e9}  # bytes/s at the first one, for its memory; assumed for GPUs, which begin ahead
_TOKENS = 0.5e6  # assumed: tokens/s of tokenize
_PART_WRITE = 0.4e9  # bytes/s of each rank's part of a checkpoint, as of a model
_WORD = 2  # bytes of a stored weight


def start_seconds(weights: int, resources: JobResources) -> float:
    """From the launch of a job that computes until its first step begins. weights: parameters that it reads."""
    return _START[resources.device] + weights * _WORD / _READ[resources.device]


def ready_seconds(weights: int, resources: JobResources) -> float:
    """Likewise, and what the first step takes beyond another one, for kernels that are compiled."""
    return start_seconds(weights, resources) + _COMPILE[resources.device]


def store_seconds(parameters: int) -> float:
    """To export a model and put it into the store."""
    return parameters * _WORD / _WRITE


def light_seconds(*, tokens: float = 0.0, written: int = 0) -> float:
    """Of a stage that computes nothing on the device. tokens: that it makes; written: parameters that it writes."""
    return _LIGHT_START + tokens / _TOKENS + store_seconds(written)


def transplant_seconds(networks: NetworkSizes) -> float:
    """To read the teacher and write the student."""
    return (
        _LIGHT_START + networks.teacher_parameters * _WORD / _READ["cpu"] + store_seconds(networks.student_parameters)
    )


def training_overheads(
    stage: str, section: Training, networks: NetworkSizes, resources: JobResources, device: Device, training: float
) -> dict[str, float]:
    """{start, heldout, checkpoints, export} of a training stage whose steps take `training` seconds."""
    taught = runs_teacher(stage, section)
    read = networks.student_parameters + (networks.teacher_parameters if taught else 0)
    return {
        "start": ready_seconds(read, resources),
        "heldout": _heldout_seconds(stage, section, networks, device),
        "checkpoints": _checkpoint_seconds(section, networks.trainable(stage, section), resources, training),
        "export": store_seconds(networks.student_parameters),
    }


def _heldout_seconds(stage: str, section: Training, networks: NetworkSizes, device: Device) -> float:
    last, steps, every = section.parts[-1], section.num_steps, section.heldout_interval
    passes = 1 + (1 + (steps - 1) // every if every else 0)  # at the end; before the first step and along the way
    flops = networks.flops(stage, last)
    forward = flops.teacher + flops.forward
    networks_run = 1 if stage_info(stage).layerwise or not flops.teacher else 2
    layers, at_once = networks_run * networks.num_layers, last.micro_batch * last.context
    return passes * device.forward_seconds(forward, section.heldout_tokens, layers, at_once)


def _checkpoint_seconds(section: Training, trained: int, resources: JobResources, training: float) -> float:
    """How long training stands still: for copies, for a write that the next one finds unfinished, and for the last."""
    steps, every = section.num_steps, section.checkpoint_every
    if section.watch.rolls_back:
        every = min(every, section.watch.rollback.every)
    count = steps // every + (steps > every and steps % every > 0)
    if not count:
        return 0.0
    size = 12 * trained / resources.processes
    copy, pin, write = size / _COPY[resources.device], size / _PIN[resources.device], size / _PART_WRITE
    interval = training * every / steps
    return pin + count * copy + (count - 1) * max(0.0, write - interval) + write
