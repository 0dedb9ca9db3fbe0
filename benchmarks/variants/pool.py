"""Units of work in parallel, in processes that share the GPU."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import transformers
from conversion import Bench
from rows import NUM_LAYERS, ROWS, Record, Settings, Unit

logger = logging.getLogger("variants")


def serve(pipe: Any, settings: Settings) -> None:
    """A worker: everything loaded, then one unit after the other. Ends with the first failure, because the
    state of the GPU after it is unknown."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    bench, opened = Bench(settings), False
    while (unit := pipe.recv()) is not None:
        try:
            if not opened:
                bench.open_data()
                opened = True
            pipe.send((unit, bench.run(unit)))
        except Exception as error:  # noqa: BLE001 a unit's failure is a result
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            pipe.send((unit, {"error": reason}))
            return


class Worker:
    """A process with its pipe; restarted if it died."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.unit: Unit | None = None

    def give(self, unit: Unit) -> None:
        """A process that is gone by now shows in `answer`."""
        self.unit = unit
        with contextlib.suppress(OSError):
            self.pipe.send(unit)

    def answer(self) -> Record:
        """Of the unit that it was given; the pipe has something, or its other end is gone."""
        try:
            return self.pipe.recv()[1]
        except (EOFError, OSError):
            self.process.join(5)
            return {"error": f"its process died (exit code {self.process.exitcode})"}

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(10)


def run_units(
    todo: list[Unit],
    settings: Settings,
    processes: int,
    until: float,
    grace: float,
    note: Callable[[Unit, Record], list[Unit]],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Run units, the most important first, until all are done or `until` (monotonic) has come; running ones then have
    `grace` seconds. note: records a result and returns the units that it makes possible. before: work of this process
    while the others start."""
    workers = [Worker(settings) for _ in range(processes)]
    before()
    try:
        while True:
            for worker in workers:
                if worker.unit is None and todo and time.monotonic() < until:
                    todo.sort(key=urgency)
                    worker.give(todo.pop(0))
            busy = [worker for worker in workers if worker.unit is not None]
            if not busy or time.monotonic() > until + grace:
                break
            for pipe in wait([worker.pipe for worker in busy], timeout=1.0):
                worker = next(one for one in busy if one.pipe is pipe)
                unit, found = worker.unit, worker.answer()
                worker.unit = None
                todo += note(unit, found)
                if "error" in found:
                    worker.stop()
                    workers[workers.index(worker)] = Worker(settings)
        for worker in workers:
            if worker.unit is not None:
                logger.info("%s: not finished in time", worker.unit.key)
    finally:
        for worker in workers:
            worker.stop()


def urgency(unit: Unit) -> tuple[Any, ...]:
    """Priority if time runs out: default rows of seed 0 (pure, hybrid, calibrated), those of the next seed,
    then the other constants and the layers that no way chose."""
    if not unit.row:
        return (-1,)
    if unit.kind == "control":
        extra = 3
    else:
        extra = ("default", "faithful", "close").index(ROWS[unit.row].kind)
    kinds = ("pure", "hybrid", "calibrated", "control", "speed")
    return extra > 0, unit.seed, extra, kinds.index(unit.kind), list(ROWS).index(unit.row), unit.layers


def follow_ups(unit: Unit, found: Record) -> list[Unit]:
    """Units that a finished pure unit makes possible: hybrids with the layers that were chosen, and controls with the
    others."""
    if unit.kind != "pure" or "error" in found or ROWS[unit.row].kind != "default":
        return []
    sets = sorted({tuple(layers) for layers in found["choices"].values()})
    left = [(layer,) for layer in range(NUM_LAYERS) if (layer,) not in sets and unit.seed == 0]
    return [
        *(Unit("hybrid", unit.row, unit.seed, layers) for layers in sets),
        *(Unit("control", unit.row, unit.seed, layers) for layers in left),
    ]
