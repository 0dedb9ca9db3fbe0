"""The training program: one loop for every stage. The objective defines the loss and the trained parameters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from radlads.model.training.lora import add_lora, merge_lora
from radlads.model.training.objectives import build_objective
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.events import Event
from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.contracts.specs import TrainSpec
from radlads.tasks.jobs.checkpoints.checkpoint import Checkpoints
from radlads.tasks.jobs.checkpoints.random_state import seed_everything
from radlads.tasks.jobs.common import Job, NonFiniteError, Preempted, run_job
from radlads.tasks.jobs.data.batch_plan import BatchPlan, plan_batches
from radlads.tasks.jobs.data.loader import TokenDataset, open_dataset
from radlads.tasks.jobs.origin import check_training
from radlads.tasks.jobs.process_group import row_group
from radlads.tasks.jobs.train.calibrate import calibrate_student
from radlads.tasks.jobs.train.engines.build import build_engine
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.heldout import heldout_metrics
from radlads.tasks.jobs.train.label_check import check_labels
from radlads.tasks.jobs.train.mfu import Utilisation
from radlads.tasks.jobs.train.steps import Step, optimizer_steps
from radlads.tasks.jobs.train.training_models import Networks, export_model, load_networks
from radlads.tasks.jobs.train.training_report import memory_bytes, write_report
from radlads.tasks.jobs.watch.watchdog import Watchdog, stopped

logger = logging.getLogger("radlads")

_TELL_SECONDS = 10.0


def main(job: Job) -> dict[str, Any]:
    """Train, export; returns the final numbers for the manifest."""
    spec: TrainSpec = job.typed
    section = spec.section
    job.open_process_group()
    seed_everything(section.seed)
    networks = load_networks(job, spec)
    lora = getattr(section, "lora", None)
    if lora is not None:
        add_lora(networks.student, lora)
    dataset = _open_data(job, "data", spec, networks)
    mixed = None if section.mixed is None else _open_data(job, "mixed_data", spec, networks).split("train")
    calibration = calibrate_student(job, spec, networks, dataset)
    objective = build_objective(spec, networks.student, networks.teacher)
    batches = partial(plan_batches, split=dataset.split("train"), world_size=job.world_size, mixed=mixed)
    plans = batches(section)
    check_labels(section, plans)
    if section.sequence_parallel > 1:
        objective.share_rows(row_group(section.sequence_parallel), section.longest_context)
    utilisation = Utilisation(job, spec, objective)
    engine = build_engine(job, objective, section, micro_batch=plans[0].sequences, num_micro=plans[0].num_micro)
    average = getattr(section, "average", None)
    if average is not None:
        engine.keep_average(average.decay)
    heldout = partial(
        heldout_metrics,
        objective,
        engine.forward,
        dataset.split("heldout"),
        context=plans[-1].context,
        batch_size=plans[-1].sequences,
        max_tokens=section.heldout_tokens,
        device=job.device,
        rank=job.rank,
        world_size=job.world_size,
        document_ids=section.reset_at_documents,
        sharing=section.sequence_parallel,
    )
    every = section.watch.rollback.every if section.watch.rolls_back else 0
    kept = {"keep": section.keep_checkpoints, "every": every, "reach": section.evidence_steps + 1}
    with Checkpoints(job, engine, seed=section.seed, **kept) as checkpoints:
        start = checkpoints.restore()
        job.record.rewind(start)
        if section.num_steps // section.checkpoint_every > start // section.checkpoint_every:
            checkpoints.prepare()
        if start == 0 and section.heldout_interval:
            job.record.log(0, heldout())
        if start == 0 and every:
            checkpoints.save(0)
        _train(job, section, engine, batches, checkpoints, heldout, start, utilisation)
        final, before = _final_heldout(engine, heldout)
    job.record.log(section.num_steps, final | before)
    with engine.reading(job.rank) as read:
        if read is None:
            return {}
        export_model(networks, job.output / "model", merge_lora(networks.student, read), dtype=job.dtype)
    return final | calibration | write_report(job, spec, final | calibration)


def _final_heldout(
    engine: Engine, heldout: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Held-out metrics of what is exported; where that is an average, also `heldout_unaveraged/<metric>` of the
    weights that trained."""
    if engine.average is None:
        return heldout(), {}
    before = {f"heldout_unaveraged/{name.removeprefix('heldout/')}": value for name, value in heldout().items()}
    engine.use_average()
    return heldout(), before


def _train(
    job: Job,
    section: Training,
    engine: Engine,
    batches: Callable[..., list[BatchPlan]],
    checkpoints: Checkpoints,
    heldout: Callable[[], dict[str, float]],
    start: int,
    utilisation: Utilisation,
) -> None:
    """Train from step `start` to the end, by way of all rollbacks. batches: section → plans. Raises Preempted and
    StoppedByWatch (both after a checkpoint), and NonFiniteError."""
    watchdog = Watchdog(job, section.watch)
    event = watchdog.judge()  # again: the job may have been stopped there, by settings that have changed since
    while True:
        if event is not None:
            start = watchdog.act(event, checkpoints)
        changed = section.after_rollbacks(len(watchdog.rollbacks))
        plans = batches(changed, rollbacks=watchdog.rollbacks if section.watch.rollback.reshuffle else ())
        if watchdog.rollbacks:
            check_labels(changed, plans)
        engine.objective.section = changed
        event = _run_steps(job, changed, engine, plans, checkpoints, watchdog, heldout, start, utilisation)
        if event is None:
            return


def _run_steps(
    job: Job,
    section: Training,
    engine: Engine,
    plans: list[BatchPlan],
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    heldout: Callable[[], dict[str, float]],
    start: int,
    utilisation: Utilisation,
) -> Event | None:
    """Optimizer steps start+1 … num_steps; returns early with what the watchdog must act on. Raises as `_train`."""
    num_steps, reported, done = section.num_steps, time.monotonic(), start
    steps = optimizer_steps(section, engine, plans, start=start, rank=job.rank, stop=lambda: _must_stop(job, watchdog))
    while True:
        try:
            step = next(steps, None)
        except NonFiniteError:
            event = watchdog.not_finite(done + 1)
            if event is None:
                raise
            engine.abandon()
            return event
        if step is None:
            return None
        done = step.number
        if done == start + 1:
            launch = time.time() - job.launched
            logger.info("the first step ended %.1f s after the launch, and took %.1f s", launch, step.seconds)
        numbers = _numbers(section, step, job.device, utilisation)
        job.record.log(done, numbers)
        event = watchdog.see(done, numbers, is_last=done == num_steps)
        job.progress(done, num_steps, "steps")
        if time.monotonic() - reported >= _TELL_SECONDS or done in (start + 1, num_steps):
            reported = time.monotonic()
            logger.info(
                "step %d/%d  loss %.4f  %.0f tokens/s", done, num_steps, numbers["loss"], numbers["tokens_per_second"]
            )
        if event is not None:
            return event
        if section.heldout_interval and done % section.heldout_interval == 0 and done < num_steps:
            job.record.log(done, heldout())
        stopping = step.seen.stop
        due = done % section.checkpoint_every == 0 or (checkpoints.every and done % checkpoints.every == 0)
        if stopping or due or done == num_steps > section.checkpoint_every:
            checkpoints.save(done)
        if stopping:
            checkpoints.wait()
            job.barrier()  # the launcher ends every rank as soon as one has exited
            if watchdog.slow is not None:
                raise stopped(watchdog.slow, "its policy is `stop`")
            raise Preempted(f"stopped on request after step {done} of {num_steps}; the next attempt resumes there")


def _must_stop(job: Job, watchdog: Watchdog) -> bool:
    return job.stop_requested or watchdog.slow is not None


def _numbers(section: Training, step: Step, device: torch.device, utilisation: Utilisation) -> dict[str, float]:
    """One row of the record."""
    index, own = section.place(step.number - 1)
    *before, part = section.parts[: index + 1]
    tokens = part.batch * part.context
    earlier = sum(one.seen_tokens for one in before)
    phase = {"phase": index + 1} if len(section.parts) > 1 else {}
    return {
        **step.seen.metrics,
        **phase,
        **({"ce_spike": 1.0} if section.has_ce_spike(step.number - 1) else {}),
        "grad_norm": step.seen.grad_norm,
        **{f"lr/{group}": rate for group, rate in step.rates.items()},
        "tokens": earlier + (own + 1) * tokens,
        "tokens_per_second": tokens / step.seconds,
        **utilisation.of(part, tokens / step.seconds),
        "seconds": step.seconds,
        "memory_bytes": memory_bytes(device),
    }


def _open_data(job: Job, name: str, spec: TrainSpec, networks: Networks) -> TokenDataset:
    dataset = open_dataset(job.input(name))
    check_training(spec, networks.student.config, dataset.tokenizer_fingerprint)
    embeddings: Any = networks.student.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if dataset.vocab_size > rows:
        raise UserError(
            f"the dataset was made with a tokenizer of {dataset.vocab_size} tokens, the model knows {rows}; "
            "tokenize with the teacher's own tokenizer"
        )
    return dataset


if __name__ == "__main__":
    run_job(main, cooperative=True)
