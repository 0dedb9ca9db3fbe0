"""The rows of a plan: of each stage its sizes, memory, time and cost, and what would help where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.choice import AttentionChoice
from radlads.tasks.contracts.recipe.memory import mlp_bits, teacher_bits
from radlads.tasks.contracts.recipe.sections import Recipe, Training
from radlads.tasks.contracts.stages import ALIGN, CHOOSE, JUDGING_STAGES, TRAINING_STAGES
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.choice_plan import choice_stage
from radlads.tasks.jobs.plan.cost import LONGEST_ON_A_CPU, judging_cost, light_costs, training_cost
from radlads.tasks.jobs.plan.memory import USABLE, NetworkSizes
from radlads.tasks.jobs.plan.remedies import (
    Setting,
    misfit,
    what_would_be_faster,
    what_would_help,
    what_would_help_judging,
)
from radlads.tasks.jobs.plan.timing.judged_memory import judging_budget, judging_memory
from radlads.tasks.jobs.plan.training_checks import plan_checkpoint

Rows = dict[str, dict[str, Any]]


def plan_stages(
    recipe: Recipe,
    resources: JobResources,
    networks: NetworkSizes,
    device: dict[str, Any],
    data: Mapping[str, Mapping[str, Any]],
    epochs: Mapping[str, float | None],
    choice: AttentionChoice | None,
    sharings: Mapping[str, tuple[int, ...]],
    findings: Findings,
) -> Rows:
    """Label of each stage, in the order of a run → its row (PlanReport.stages). Adds misfits and warnings. device: as
    `describe_device`; data, epochs, sharings: as check_dataset,
    check_epochs and check_sharing return them."""
    tokens = {name: _dataset_tokens(recipe, name, data) for name in recipe.datasets_used}
    stages, after = light_costs(recipe, networks, tokens, device["kind"], resources)
    limit = USABLE * device["memory_bytes"]
    for stage in TRAINING_STAGES:
        section = getattr(recipe, stage)
        if section is not None:
            row = _training_row(recipe, stage, section, resources, networks, device, sharings.get(stage, ()), findings)
            stages[stage] = row | {"epochs": epochs.get(stage)}
        if stage == ALIGN.name and choice is not None:
            stages[CHOOSE.name] = choice_stage(choice, recipe, networks, device, resources, findings)
    for stage in JUDGING_STAGES:
        section = getattr(recipe, stage)
        if section is None or recipe.pretrain is not None:
            continue
        budget = judging_budget(section, networks, resources, device["memory_bytes"])
        memory = judging_memory(section, networks, resources, budget)
        if memory["total"] > limit:
            divisible = recipe.student.calibrate is None
            helps = what_would_help_judging(stage, section, networks, resources, limit, divisible=divisible)
            findings.misfits.append(misfit(stage, memory, device, helps))
        cost = judging_cost(section, networks, recipe, device["kind"], resources, budget)
        stages[stage] = {"memory_bytes_per_gpu": memory} | cost
    long = [stage for stage, row in stages.items() if row["seconds"] is None]
    if long:
        findings.warnings.append(
            f"on this CPU {' and '.join(long)} would take more than {LONGEST_ON_A_CPU / 3600:,.0f} hours each; to plan "
            "for GPUs, give --gpus and --gpu-memory, or resources.processes and resources.gpu_memory_gib"
        )
    return stages | after


def _training_row(
    recipe: Recipe,
    stage: str,
    section: Training,
    resources: JobResources,
    networks: NetworkSizes,
    device: dict[str, Any],
    sharings: tuple[int, ...],
    findings: Findings,
) -> dict[str, Any]:
    bits, limit = (teacher_bits(recipe, stage), mlp_bits(recipe, stage)), USABLE * device["memory_bytes"]
    divisible = recipe.student.calibrate is None
    setting = Setting(stage, section, resources, *bits, divisible=divisible, sharings=sharings)
    memory = setting.memory(networks)
    if memory["total"] > limit:
        findings.misfits.append(misfit(stage, memory, device, what_would_help(setting, networks, limit)))
    trainable = networks.trainable(stage, section)

    def cost_of(changed: Training) -> dict[str, Any]:
        return training_cost(stage, changed, networks, device["kind"], resources)

    cost = cost_of(section)
    if memory["total"] <= limit and resources.device == "cuda":
        faster = what_would_be_faster(setting, networks, limit, lambda changed: cost_of(changed)["seconds"])
        findings.advice += [] if faster is None else [faster]
    if len(section.parts) == 1:
        del cost["phases"]
    return {
        "tokens": section.seen_tokens,
        "steps": section.num_steps,
        "context": section.longest_context,
        "batch": section.batch,
        "trainable_parameters": trainable,
        "memory_bytes_per_gpu": memory,
        "checkpoint": plan_checkpoint(stage, section, trainable, resources, findings),
    } | cost


def _dataset_tokens(recipe: Recipe, name: str, data: Mapping[str, Mapping[str, Any]]) -> float:
    """That a dataset will have: as its beginning lets expect, else its limit, else what training reads of it."""
    found = data.get(name, {}).get("tokens") or recipe.data[name].max_tokens
    if found:
        return float(found)
    read = (getattr(recipe, stage) for stage in recipe.training_stages)
    return float(max((section.seen_tokens for section in read if name in section.datasets.values()), default=0))
