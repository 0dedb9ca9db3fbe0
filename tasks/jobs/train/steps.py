"""The optimizer steps of a training stage, as a generator that every training loop uses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.jobs.data.batch_plan import BatchPlan
from radlads.tasks.jobs.train.engines.engine import Engine, StepResult
from radlads.tasks.jobs.train.schedule import learning_rates

logger = logging.getLogger("radlads")


@dataclass(frozen=True)
class Step:
    """A completed optimizer step."""

    number: int
    """Counted from 1."""
    seen: StepResult
    rates: dict[str, float]
    """Parameter group → learning rate."""
    seconds: float


def optimizer_steps(
    section: Training,
    engine: Engine,
    plans: Sequence[BatchPlan],
    *,
    start: int = 0,
    rank: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Yield the steps start+1 ... num_steps, each phase with its own settings.

    plans: of each phase. stop: whether this rank received the request to stop, which each step shares. Raises
    NonFiniteError and UserError as `Engine.step` does.
    """
    for index in range(start, section.num_steps):
        began = time.perf_counter()
        phase, own = section.place(index)
        plan = plans[phase]
        if index == start or own == 0:
            _enter(section, engine, plan, phase, own)
        engine.objective.begin_step(index)
        batches = (plan.micro(own, rank, micro) for micro in range(plan.num_micro))
        rates = learning_rates(section, index)
        seen = engine.step(batches, rates, index + 1, stop=stop())
        yield Step(index + 1, seen, rates, time.perf_counter() - began)


def _enter(section: Training, engine: Engine, plan: BatchPlan, phase: int, own: int) -> None:
    """Prepare the engine for a phase that begins, or continues after a restore."""
    if (plan.sequences, plan.num_micro) != (engine.micro_batch, engine.num_micro) or phase > 0:
        engine.accumulate(plan.sequences, plan.num_micro)
    if phase > 0 and own == 0:
        logger.info("phase %d begins: context %d, batch %d", phase + 1, plan.context, plan.batch)
        if section.begins_anew(phase):
            engine.forget()
