"""Fits a drafted recipe to a machine: passes as large and as little recomputed as memory allows, then ZeRO-3, an 8-bit
teacher, the optimizer in host memory, frozen MLPs, in this order, each only where a stage does not fit without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.memory import FrozenBits
from radlads.tasks.contracts.recipe.sections import Recipe, Training
from radlads.tasks.contracts.stages import DISTILL, stage_info
from radlads.tasks.jobs.draft.stages_text import Fit
from radlads.tasks.jobs.plan.cost import training_cost
from radlads.tasks.jobs.plan.memory import USABLE, NetworkSizes
from radlads.tasks.jobs.plan.remedies import Setting

_GIB = 1024**3
_Kept = bool | Literal["selective"]
_WORDS: dict[_Kept, str] = {False: "false", "selective": "selective", True: "true"}


def fit_to_machine(recipe: Recipe, networks: NetworkSizes, resources: JobResources, device: dict[str, Any]) -> Fit:
    """The settings of the fastest passes that fit. device: as describe_device. Raises UserError if nothing fits."""
    limit = USABLE * device["memory_bytes"]
    nearest: list[tuple[int, str]] = []
    for fit in _machines(resources):
        changed = resources.model_copy(
            update={"zero_stage": max(resources.zero_stage, fit.zero_stage), "offload_optimizer": fit.offload}
        )
        passes: dict[str, tuple[int, str]] = {}
        for stage in recipe.training_stages:
            section: Training = getattr(recipe, stage)
            if fit.freeze_mlp and stage_info(stage).trains_whole_student:
                section = section.model_copy(update={"freeze": (*section.freeze, "mlp")})
            found = _fastest(Setting(stage, section, changed, _bits(fit)), networks, device["kind"], limit)
            if isinstance(found, int):
                nearest.append((found, stage))
                break
            passes |= found
        else:
            return replace(fit, passes=passes)
    size, stage = min(nearest)
    raise UserError(_misfit(stage, size / _GIB / USABLE, resources, device["memory_bytes"] / _GIB))


def _misfit(stage: str, needs: float, resources: JobResources, has: float) -> str:
    """needs, has: GiB."""
    if resources.device == "cpu":
        return (
            f"{stage} would need {needs:,.1f} GiB of memory with one row a pass, and this machine has {has:,.1f}; plan "
            "for GPUs, e.g. --gpus 8xH100"
        )
    several = resources.processes > 1
    where = f"each of {resources.processes} GPUs, which have" if several else "the GPU, which has"
    return (
        f"{stage} would need {needs:,.1f} GiB on {where} {has:,.1f}; with one row a pass, {'ZeRO-3, ' * several}an "
        "8-bit teacher, the optimizer in host memory and frozen MLPs it does not fit; plan for more or larger GPUs "
        "(--gpus)"
    )


def _machines(resources: JobResources) -> Iterator[Fit]:
    yield Fit()
    if resources.device == "cpu":
        return
    several = resources.processes > 1
    if several:
        yield Fit(zero_stage=3)
    yield Fit(teacher_bits=8)
    if several:
        yield Fit(zero_stage=3, teacher_bits=8)
    yield Fit(offload=True)
    yield Fit(offload=True, teacher_bits=8)
    if several:
        yield Fit(zero_stage=3, freeze_mlp=True)
        yield Fit(zero_stage=3, teacher_bits=8, freeze_mlp=True)
    yield Fit(teacher_bits=8, freeze_mlp=True)
    yield Fit(offload=True, teacher_bits=8, freeze_mlp=True)


def _bits(fit: Fit) -> FrozenBits:
    return 8 if fit.teacher_bits == 8 else 16


def _fastest(
    setting: Setting, networks: NetworkSizes, kind: str | None, limit: float
) -> dict[str, tuple[int, str]] | int:
    """Name of the pass → (micro_batch, gradient_checkpointing), of equally fast ones those with the most rows; if none
    fits, the bytes that the smallest needs."""
    section, resources = setting.section, setting.resources
    best: tuple[float, int, dict[str, tuple[int, str]]] | None = None
    needs: list[int] = []
    kinds: tuple[_Kept, ...] = (False,) if resources.device == "cpu" else (False, "selective", True)
    for kept in kinds:
        for share in _divisors(section.batch // resources.processes):
            changed = _changed(section, share, kept, resources.processes)
            needs.append(replace(setting, section=changed).need(networks))
            if needs[-1] > limit:
                continue
            seconds = training_cost(setting.stage, changed, networks, kind, resources)["seconds"] or 0.0
            if best is None or (seconds, -share) < best[:2]:
                passes = {setting.stage: (share, _WORDS[kept])}
                phases = getattr(changed, "phases", ())
                if phases:
                    passes[f"{DISTILL.name}.long"] = (phases[-1].micro_batch, _WORDS[kept])
                best = (seconds, -share, passes)
            break
    return min(needs) if best is None else best[2]


def _divisors(number: int) -> list[int]:
    """The largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def _changed(section: Training, share: int, kept: _Kept, processes: int) -> Training:
    """The section with passes of `share` rows; those of a longer phase of as many tokens."""
    changes: dict[str, Any] = {"micro_batch": share, "gradient_checkpointing": kept}
    phases = getattr(section, "phases", ())
    if phases:
        changes["phases"] = tuple(
            phase
            if phase.context is None
            else phase.model_copy(
                update={"micro_batch": _at_most(share * section.context // phase.context, phase.batch // processes)}
            )
            for phase in phases
        )
    return section.model_copy(update=changes)


def _at_most(wanted: int, number: int) -> int:
    """The largest divisor of a number that is not more than wanted."""
    return next((size for size in _divisors(number) if size <= max(1, wanted)), 1)
