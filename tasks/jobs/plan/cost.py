"""Time and cost of each stage of a plan: the speed of training by timing/, and all that passes besides."""

from __future__ import annotations

from typing import Any

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.recipe.sections import Evaluate, Needle, SampleSource, Training
from radlads.tasks.contracts.stages import PUBLISH, TOKENIZE, TRANSPLANT
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.batching.recorded_decoding import records_steps
from radlads.tasks.jobs.plan.memory import NetworkSizes
from radlads.tasks.jobs.plan.timing.measured import CPU
from radlads.tasks.jobs.plan.timing.overheads import (
    light_seconds,
    ready_seconds,
    store_seconds,
    training_overheads,
    transplant_seconds,
)
from radlads.tasks.jobs.plan.timing.passes import Device, judging_flops, judging_seconds, sampling_seconds
from radlads.tasks.jobs.plan.timing.speed import UNKNOWN_PEAK, expected_speed
from radlads.tasks.jobs.plan.timing.step_time import CORE_FLOPS, work_of
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS, find_kind

LONGEST_ON_A_CPU = 1000 * 3600.0
"""Seconds beyond which the time of a stage on a CPU is not told: nobody waits for it, and the rates are of small
models."""


def likely_gpu(gibibytes: float) -> str | None:
    """A well-known GPU with that much memory (GB on its data sheet, or GiB), for its speed; None: there is none."""
    kinds = ("MI300X", "H200", "H100", "L40S", "RTX 4090")
    return next((k for k in kinds if GPU_KINDS[k].gibibytes * 0.93 <= gibibytes <= GPU_KINDS[k].gibibytes * 1.1), None)


def device_kind(name: str | None, resources: JobResources) -> tuple[str | None, float]:
    """(kind of GPU, CPU, or None: unknown; peak FLOP/s) of one process's device. name: of the GPU."""
    if resources.device == "cpu":
        return CPU, CORE_FLOPS * resources.threads
    kind = find_kind(name or "")
    return kind, UNKNOWN_PEAK if kind is None else GPU_KINDS[kind].peak_flops


def training_cost(
    stage: str, section: Training, networks: NetworkSizes, kind: str | None, resources: JobResources
) -> dict[str, Any]:
    """{flops, speed, mfu, seconds_by, phases, and as _cost} of a training stage. speed: of each part, in words, where
    its expected time comes from; seconds_by: {train, start, heldout, checkpoints, export}."""
    parts = [_part_cost(stage, part, networks, kind, resources) for part in section.parts]
    training = sum(part["seconds"] for part in parts)
    device = Device(kind, resources.processes, resources.threads)
    seconds_by = {"train": training} | training_overheads(stage, section, networks, resources, device, training)
    flops = sum(part["flops"] for part in parts)
    peak = GPU_KINDS[kind].peak_flops * resources.processes if kind in GPU_KINDS else None
    return {
        "flops": flops,
        "speed": tuple(dict.fromkeys(part.pop("speed") for part in parts)),
        "mfu": None if peak is None else flops / training / peak,
        "seconds_by": seconds_by,
        "phases": [part | _cost(part["seconds"], resources) for part in parts],
    } | _cost(sum(seconds_by.values()), resources)


def _part_cost(
    stage: str, part: Training, networks: NetworkSizes, kind: str | None, resources: JobResources
) -> dict[str, Any]:
    speed = expected_speed(work_of(stage, part, networks, resources), kind)
    sizes = {"tokens": part.seen_tokens, "steps": part.num_steps, "context": part.context, "batch": part.batch}
    flops = networks.flops(stage, part).total * part.seen_tokens
    return sizes | {"flops": flops, "speed": speed.source, "seconds": speed.step_seconds * part.num_steps}


def judging_cost(
    section: Evaluate | Needle,
    networks: NetworkSizes,
    recipe: Recipe,
    kind: str | None,
    resources: JobResources,
    budget: RowBudget,
) -> dict[str, Any]:
    """{flops, seconds_by, and as _cost} of evaluate or needle. budget: as `judging_budget`."""
    recorded = (
        isinstance(section, Needle)
        and networks.num_recurrent == networks.num_layers
        and records_steps(resources, networks.student_parameters)
    )
    device = Device(kind, resources.processes, resources.threads, recorded, networks.hidden)
    return {"flops": judging_flops(section, networks, recipe)} | passes_cost(
        judging_seconds(section, networks, recipe, device, budget), networks, resources
    )


def passes_cost(
    computing: float, networks: NetworkSizes, resources: JobResources, *, exported: int = 0
) -> dict[str, Any]:
    """{seconds_by, and as _cost} of a stage that runs both networks for `computing` seconds."""
    read = networks.teacher_parameters + networks.student_parameters
    seconds_by = {"start": ready_seconds(read, resources), "judge": computing}
    if exported:
        seconds_by["export"] = store_seconds(exported)
    return {"seconds_by": seconds_by} | _cost(sum(seconds_by.values()), resources)


def light_costs(
    recipe: Recipe, networks: NetworkSizes, tokens: dict[str, float], kind: str | None, resources: JobResources
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The stages before training and those after it that compute nothing on the device: label → as _cost. The GPUs
    wait, and are paid for. tokens: dataset → tokens that it will have."""
    before = {}
    for name, count in tokens.items():
        samples = [one for one in recipe.data[name].sources if isinstance(one, SampleSource)]
        sampling = sum(
            sampling_seconds(one, networks, Device(kind, resources.processes, resources.threads)) for one in samples
        )
        if samples:
            sampling += ready_seconds(networks.teacher_parameters, resources)
        cost = _cost(light_seconds(tokens=count) + sampling, resources)
        before[f"{TOKENIZE.name} {name}"] = {"tokens": round(count)} | cost
    if recipe.pretrain is not None:
        return before, {}
    before[TRANSPLANT.name] = _cost(transplant_seconds(networks), resources)
    return before, {PUBLISH.name: _cost(light_seconds(written=networks.student_parameters), resources)}


def _cost(seconds: float, resources: JobResources) -> dict[str, Any]:
    """{seconds, gpu_hours, dollars}: seconds None for what would take too long on a CPU, the others on any CPU;
    dollars also without a price."""
    if resources.device == "cpu":
        return {"seconds": seconds if seconds < LONGEST_ON_A_CPU else None, "gpu_hours": None, "dollars": None}
    gpu_hours = seconds * resources.processes / 3600
    price = resources.dollars_per_gpu_hour
    return {"seconds": seconds, "gpu_hours": gpu_hours, "dollars": None if price is None else gpu_hours * price}
