"""Shorter autotuning of other libraries: candidates are compiled beforehand, in parallel, on the CPU.

Triton's `autotune` compiles its candidates one after another when a kernel is first called, which takes minutes for an
operator of a dozen kernels. Here processes make the same calls on few tokens without launching anything: each candidate
is compiled by one of them and left in Triton's cache. The search in the measuring process is still the library's own,
over all of its candidates, but only has to time them.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.autotuner import Autotuner

WORKERS = max(1, min(14, (os.cpu_count() or 2) - 2))
FAILURES = (RuntimeError, AssertionError, ValueError, TypeError, triton.runtime.errors.TritonError)
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Case:
    """Calls to compile for. `searched`: all processes make them and divide the candidates; else one makes them."""

    name: str
    run: Callable[[], object]
    searched: bool


class Share:
    """Distributes numbered pieces of work that all processes reach in the same order."""

    def __init__(self, tickets: Any, case: int) -> None:
        self.tickets, self.case = tickets, case
        self.met, self.mine = -1, self.draw()

    def draw(self) -> int:
        with self.tickets.get_lock():
            self.tickets[self.case] += 1
            return self.tickets[self.case] - 1

    def take(self) -> bool:
        """Whether the next piece is this process's own; a number is drawn only when the one before is done."""
        if self.met == self.mine:
            self.mine = self.draw()
        self.met += 1
        return self.met == self.mine


def die_with_parent() -> None:
    """Have Linux end this process when its parent ends, for any reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def complain(name: str, error: Exception) -> None:
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    sys.stderr.write(f"not compiled: {name}: {first[:160]}\n")


def compile_only(share: Share) -> Callable[..., None]:
    """In place of `Autotuner.run`: compiles this process's share of the candidates and launches nothing."""
    known = set()

    def run(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        named = {**tuner.nargs, **{name: x for name, x in kwargs.items() if name in tuner.arg_names}}
        call = [(name, str(x.dtype) if isinstance(x, Tensor) else repr(x)) for name, x in sorted(named.items())]
        if (id(tuner), tuple(call)) in known:  # a backward pass computes again what the forward pass did
            return
        known.add((id(tuner), tuple(call)))
        for number, config in enumerate(tuner.prune_configs(kwargs)):
            if not share.take():
                continue
            try:
                kernel = tuner.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})
                if number == 0:
                    _ = kernel.run  # builds the launcher too, the same one for all candidates
            except triton.OutOfResources:
                pass  # does not fit this GPU: the search passes over it too
            except FAILURES as error:
                complain(f"{tuner.base_fn.__name__} {config}", error)

    return run


def work(index: int, cases: Callable[[], list[Case]], tickets: Any, progress: Any) -> None:
    """One process: all cases in order. `progress[index]` is the number of finished ones."""
    die_with_parent()
    os.nice(5)
    torch.set_num_threads(1)
    whole = Share(tickets, 0)
    launch = Autotuner.run
    for number, case in enumerate(cases()):
        try:
            if case.searched:
                Autotuner.run = compile_only(Share(tickets, number + 1))
                case.run()
            elif whole.take():
                case.run()
        except FAILURES as error:
            complain(case.name, error)
        finally:
            Autotuner.run = launch
            torch.cuda.empty_cache()
        progress[index] = number + 1


class Compilers:
    """Processes that compile for the cases that `cases` lists, in their order, while this one measures."""

    def __init__(self, cases: Callable[[], list[Case]], count: int = WORKERS) -> None:
        context = multiprocessing.get_context("spawn")
        self.names = [case.name for case in cases()]
        self.progress = context.RawArray("i", count)
        self.tickets = context.Array("i", len(self.names) + 1)  # kept: its lock ends with it
        self.processes = [
            context.Process(target=work, args=(index, cases, self.tickets, self.progress), daemon=True)
            for index in range(count)
        ]

    def __enter__(self) -> "Compilers":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, name: str, deadline: float = float("inf")) -> None:
        """Until everything up to the last case of this name is compiled, or TimeoutError."""
        last = max(number for number, found in enumerate(self.names, 1) if found == name)
        while any(n < last and p.is_alive() for n, p in zip(self.progress, self.processes, strict=True)):
            if time.time() > deadline:
                raise TimeoutError(f"out of time while compiling {name}")
            time.sleep(0.05)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Context without compilation, for reported timings."""
        running = [process for process in self.processes if process.is_alive()]
        for process in running:
            os.kill(process.pid, signal.SIGSTOP)
        try:
            time.sleep(0.05)
            yield
        finally:
            for process in running:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGCONT)


@contextmanager
def search(deadline: float = float("inf")) -> Iterator[None]:
    """Every tuned kernel that is called inside searches again, for the shapes of this call; TimeoutError if late.

    Each candidate is timed for 12 ms after 3 ms instead of Triton's 100 after 25, and nothing is read from or written
    to the results kept on disk: otherwise a setting found at one shape would be used at another with the same key.
    """
    original = Autotuner.run
    fresh = set()

    def bench(call: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
        if time.time() > deadline:
            raise TimeoutError("out of time while searching")
        try:
            return triton.testing.do_bench(call, warmup=3, rep=12, quantiles=quantiles)
        except RuntimeError as error:
            if "PassManager" not in str(error):
                raise
            return [float("inf")] * 3  # the compiler failed on this candidate

    def run(tuner: Autotuner, *args: Any, **kwargs: Any) -> object:
        if tuner not in fresh:
            fresh.add(tuner)
            tuner.cache.clear()
            tuner.cache_results, tuner.do_bench = False, bench
        return original(tuner, *args, **kwargs)

    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = original
