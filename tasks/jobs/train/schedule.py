"""Learning rate of a parameter group at an optimizer step, a pure function (2505.03005, and the code it came with)."""

from __future__ import annotations

import math

from radlads.tasks.contracts.recipe.recipe import Rate, Schedule, Training

_WARMUP_FROM = 0.01


def learning_rate(schedule: Schedule, rate: Rate, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` (counted from 0) of `num_steps`.

    Progress p is the share of the steps after warm-up that are done before this one, and q is p stretched from
    [begin, end] to [0, 1]:
        quarter_cosine        final + (start − final)·cos(π q / 2)
        cosine                final + (start − final)·(1 + cos(π q)) / 2
        stable_cosine_stable  the quarter cosine, which holds `start` up to `begin` and `final` from `end` on
        linear                start + (final − start)·q
        exponential           start·(final / start)^q
        constant              start
    Warm-up multiplies this by a line from 1 % to 100 %, over warmup_steps but never more than a tenth of the steps.
    """
    warmup = warmup_steps(schedule, num_steps)
    progress = min(1.0, max(0.0, (step - warmup) / max(1, num_steps - warmup)))
    stretched = min(1.0, max(0.0, (progress - schedule.begin) / (schedule.end - schedule.begin)))
    if schedule.kind == "constant":
        scheduled = rate.start
    elif schedule.kind == "cosine":
        scheduled = rate.final + (rate.start - rate.final) * (1 + math.cos(math.pi * stretched)) / 2
    elif schedule.kind == "linear":
        scheduled = rate.start + (rate.final - rate.start) * stretched
    elif schedule.kind == "exponential":
        scheduled = rate.start * (rate.final / rate.start) ** stretched if rate.start else 0.0
    else:
        scheduled = rate.final + (rate.start - rate.final) * math.cos(math.pi * stretched / 2)
    if step < warmup:
        scheduled *= _WARMUP_FROM + (1 - _WARMUP_FROM) * step / warmup
    return scheduled


def learning_rates(section: Training, step: int) -> dict[str, float]:
    """The rates of both parameter groups, `mixer` and `rest`, at an optimizer step of a training section; a phase has a
    schedule of its own, over its own steps."""
    index, own = section.place(step)
    part = section.parts[index]
    return {
        "mixer": learning_rate(part.schedule, part.mixer_rate, own, part.own_steps),
        "rest": learning_rate(part.schedule, part.rest_rate, own, part.own_steps),
    }


def warmup_steps(schedule: Schedule, num_steps: int) -> int:
    """Number of warm-up steps."""
    return min(schedule.warmup_steps, num_steps // 10)
