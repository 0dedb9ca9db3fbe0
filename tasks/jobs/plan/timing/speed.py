"""The speed that a plan expects: the computed time of a step, corrected by what was measured at similar ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.jobs.plan.timing.measured import CPU, SpeedRow, measured_rows
from radlads.tasks.jobs.plan.timing.step_time import Work, cpu_step_seconds, gpu_step_seconds
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS

ASSUMED = 0.15
"""Share of the peak where nothing similar was measured: of the published 7B run, step 2, 3,157 tokens a second on an
MI300X (2505.03005, table 3)."""
UNKNOWN_PEAK = 100e12
"""FLOP/s that a GPU of unknown kind is taken to have."""
_NEAR = 0.5  # distance up to which a row counts as a measurement of the case itself
_PRIOR = 0.05  # weight of the computed time beside the rows'


@dataclass(frozen=True)
class Speed:
    """Of an optimizer step."""

    step_seconds: float
    source: str
    """Where it comes from, in words."""


def expected_speed(work: Work, kind: str | None, rows: Sequence[SpeedRow] | None = None) -> Speed:
    """kind: of GPU, as in GPU_KINDS, or CPU; None: unknown. rows: those of the package."""
    rows = measured_rows() if rows is None else rows
    gpu = None if kind is None else GPU_KINDS.get(kind)
    if kind != CPU and (gpu is None or not (gpu.nvidia or any(row.kind == kind for row in rows))):
        peak = UNKNOWN_PEAK if gpu is None else gpu.peak_flops
        seconds = work.step_tokens * (work.flops + work.recomputed) / (peak * ASSUMED)
        of = f"of {peak / 1e12:,.0f} TFLOP/s" + (", a GPU of unknown kind" if gpu is None else "")
        return Speed(seconds, f"assumed: {ASSUMED:.0%} {of}, the share of the published 7B run")
    own = [row for row in rows if row.kind == kind]
    near = own or [row for row in rows if row.kind != CPU]
    computed = computed_seconds(work, kind or "")
    if not near:
        return Speed(computed, "computed; nothing was measured")
    weights = [math.exp(-2 * distance(row.work, work)) for row in near]
    logs = [math.log(row.step_seconds / computed_seconds(row.work, row.kind)) for row in near]
    correction = sum(w * x for w, x in zip(weights, logs, strict=True)) / (_PRIOR + sum(weights))
    nearest = min(near, key=lambda row: distance(row.work, work))
    measured = bool(own) and distance(nearest.work, work) < _NEAR
    source = f"measured on {nearest}" if measured else f"estimated; the nearest measurement is of {nearest}"
    return Speed(computed * math.exp(correction), source)


def computed_seconds(work: Work, kind: str) -> float:
    """Of a step, without measurements. kind: of GPU, or CPU."""
    return cpu_step_seconds(work) if kind == CPU else gpu_step_seconds(work, GPU_KINDS[kind])


def distance(one: Work, other: Work) -> float:
    """How different two steps are in what makes speed differ: 0 for equal ones, about 1 for another loss, or eight
    times the size."""
    kinds = [(stage_info(work.stage).layerwise, work.taught) for work in (one, other)]
    return (
        abs(math.log2(_layer_flops(one) / _layer_flops(other))) / 3
        + abs(math.log2(one.context / other.context)) / 3
        + abs(math.log2(one.tokens / other.tokens)) / 4
        + abs(math.log2(one.devices / other.devices)) / 3
        + (kinds[0] != kinds[1])
        + 0.5 * (bool(one.recomputed) != bool(other.recomputed))
        + 0.5 * (bool(one.gathered) != bool(other.gathered))
        + 0.5 * (one.sharing != other.sharing)
        + 0.5 * (one.wide_decay != other.wide_decay)
        + 2.0 * (one.offload != other.offload)
        + 2.0 * (one.recorded != other.recorded)
    )


def _layer_flops(work: Work) -> float:
    return work.flops / work.layers
