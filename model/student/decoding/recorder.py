"""Records what a function launches on a GPU as a CUDA graph, which then is one launch. An exported model carries this
file."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

Run = Callable[[], Any]
NUM_EAGER = 2
"""Calls before a function is recorded: kernels are compiled, libraries have their workspaces, caches are filled."""


class WaitsForGpuError(Exception):
    """A function reads on the host what the GPU computes. The message says where."""


class NotRecordedError(Exception):
    """A recording failed; the message says why in one line."""


class Recorder(Protocol):
    """Records what a function launches."""

    def rehearse(self, run: Run, *, strict: bool) -> Any:
        """Run it as it will be recorded. strict: raises WaitsForGpuError where it cannot be."""

    def record(self, run: Run) -> tuple[Any, Callable[[], None]]:
        """(its results, whose addresses stay; what replays it). Runs nothing. Raises NotRecordedError."""


class CudaRecorder:
    """Records on a stream of its own, and keeps the tensors of all graphs in one pool: no two run at once, and none
    reads what another one left behind."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, run: Run, *, strict: bool) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), _without_waiting(strict):
            results = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def record(self, run: Run) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads (a checkpoint's upload, NCCL's watchdog) go on.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                results = run()
        except RuntimeError as error:
            first = _first(error)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from error
            raise NotRecordedError(_line(first)) from error
        return results, graph.replay


@contextmanager
def _without_waiting(strict: bool) -> Iterator[None]:
    """Raise WaitsForGpuError where the host waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error" if strict else before)
    try:
        yield
    except RuntimeError as error:
        if strict and "synchronizing" in str(error):
            raise WaitsForGpuError(_line(error)) from error
        raise
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _first(error: BaseException) -> BaseException:
    """The error that came first: to end a recording that failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _line(error: BaseException) -> str:
    """An error in one line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = "/".join(place.filename.split("/")[-3:])
    return f"{' '.join(str(error).split())[:200]}; {file}:{place.lineno}: {place.line}"
