"""One rank of the measured training job: the product's training program with measurements.

    python product.py job.json

The product is not changed, except that no model is exported after the last step, and that a case may name an engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.fsdp import FSDPModule

from radlads.kernels.mixer_ops import wkv7_finish, wkv7_operands
from radlads.model.mixers.shared import rwkv7_design
from radlads.tasks.jobs import process_group as group
from radlads.tasks.jobs.common import Job, execute, open_job
from radlads.tasks.jobs.exit_reasons import EXIT_CODES
from radlads.tasks.jobs.train import train, training_models
from radlads.tasks.jobs.train.engines import deepspeed_config
from radlads.tasks.jobs.train.engines import engine as engine_module
from radlads.tasks.jobs.train.engines.engine import Engine
from training_bench.case import Case
from training_bench.measuring import Watch, product_mixer_memory


class Measured(Exception):  # noqa: N818
    """The last step is done; there is nothing to export."""


def watch_engine(engine: Engine, watch: Watch) -> Engine:
    """The engine, reporting its steps to the watch."""
    objective, step = engine.objective, engine.step

    def watched_step(batches: Any, rates: Any, number: int, *, stop: bool) -> Any:
        watch.before(number, student=objective.student, teacher=objective._teacher[0], objective=objective)
        with nullcontext() if watch.profile is None else watch.profile.engine(engine):
            result = step(batches, rates, number, stop=stop)
        watch.after(number, result.metrics["loss"])
        return result

    engine.step = watched_step  # type: ignore[method-assign]
    return engine


def build_candidate(kind: str, job: Job, objective: Any, section: Any, **sizes: int) -> Engine:
    """DeepSpeed's ZeRO-2 in place of the product's engine.

    deepspeed: gradients reduced on the stream of the backward pass, each whole on every rank. overlap: on a stream of
    their own. overlap-reduce: and each to the rank that holds the part, which halves what they send.
    """
    build_config = deepspeed_config.build_config

    def configured(*args: Any) -> dict[str, Any]:
        config = build_config(*args)
        if kind != "deepspeed":
            config["zero_optimization"] |= {"overlap_comm": True}
            config["zero_optimization"] |= {"use_multi_rank_bucket_allreduce": kind != "overlap-reduce"}
        return config

    with mock.patch.object(engine_module, "build_config", configured):
        return Engine(objective, section, device=job.device, dtype=job.dtype, zero_stage=2, **sizes)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """The training program's parts, reporting their progress to the watch."""
    load, save, wait = train.load_networks, train.Checkpoints.save, train.Checkpoints.wait
    loop, build = train._train, train.build_engine
    if watch.case.engine != "product":
        build = partial(build_candidate, watch.case.engine)

    def load_networks(*args: Any) -> Any:
        watch.mark("imported, joined and checked")
        networks = load(*args)
        watch.mark("networks loaded")
        return networks

    def timed(name: str, method: Any) -> Any:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                watch.found[name] = watch.found.get(name, 0.0) + time.perf_counter() - began

        return run

    def run_loop(job: Job, section: Any, engine: Any, *args: Any) -> None:
        loop(job, section, engine, *args)
        watch.found["trained"] = sum(parameter.numel() for parameter in engine.parameters.values())
        for parameter in engine.objective.parameters():
            parameter.grad = None
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        if watch.case.zero < 3:  # else no rank holds a mixer whole
            for part in engine.objective.student.modules():
                if isinstance(part, FSDPModule):
                    part.unshard()
            watch.found["mixer"] = product_mixer_memory(engine.objective.student, watch.case)
        raise Measured

    with (
        mock.patch.object(train, "build_engine", lambda *args, **sizes: watch_engine(build(*args, **sizes), watch)),
        mock.patch.object(train, "load_networks", load_networks),
        mock.patch.object(train, "_train", run_loop),
        mock.patch.object(train.Checkpoints, "save", timed("save_seconds", save)),
        mock.patch.object(train.Checkpoints, "wait", timed("wait_seconds", wait)),
    ):
        yield


@contextmanager
def unfused() -> Iterator[None]:
    """Mixers ask for the torch forms of the operators around their recurrence; norms and MLPs are transformers'."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(training_models, "fuse_modules"))
        for operator in (wkv7_operands, wkv7_finish):
            asked = partial(operator, backend="torch")
            stack.enter_context(mock.patch.object(rwkv7_design, operator.__name__, asked))
        yield


def main(job: Job) -> dict[str, Any]:
    """A job's main; its product is a file with a note that no model is exported."""
    watch = Watch(job.scratch, Case.read(job.scratch / "case.json"), job.device, job.rank)
    try:
        with watched(watch), nullcontext() if watch.case.fused else unfused():
            train.main(job)
    except Measured:
        watch.write()
    if job.rank == 0:
        (job.output / "measured.txt").write_text("no model is exported by the benchmark\n", encoding="utf-8")
    return {}


if __name__ == "__main__":
    group.follow_launcher()
    this = open_job(Path(sys.argv[1]))
    reason = execute(main, this)
    group.leave_group(orderly=reason in ("done", "preempted", "nonfinite"))
    group.end_process(EXIT_CODES[reason])
