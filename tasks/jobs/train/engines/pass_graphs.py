"""Training passes that are recorded once as a CUDA graph and then replayed: one launch instead of thousands.

A kind of pass is its inputs' shapes and the objective's settings, which become constants of the graph. The first passes
of a kind run as they are, on the stream that records, so that kernels are compiled, libraries have their workspaces
and caches are filled; they are passes of the training like any other. The last of them must not wait for the GPU, which
a graph cannot record. Then the kind is recorded, which runs nothing, and replayed.

Rules of a recorded pass (torch.cuda.graph): all tensors that go in or come out stay at their addresses; no shape
depends on data (packed documents: their number changes), nothing is read on the host (`.item()`, `bool(tensor)`), no
collective, no random state that is saved and restored. The range of log decays is not watched in a replay
(kernels/wkv7/decay_range.py): one out of range makes the loss of its step not finite, which each step checks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from radlads.kernels.wkv7.decay_range import WATCH
from radlads.model.student.decoding import recorder as decoding
from radlads.model.student.decoding.recorder import NUM_EAGER, NotRecordedError, Recorder, WaitsForGpuError
from radlads.tasks.contracts.errors import UserError

if TYPE_CHECKING:
    from radlads.tasks.jobs.data.loader import Batch

logger = logging.getLogger("radlads")

Values = dict[str, Tensor]
Run = Callable[[], Values]


class PassGraphs:
    """Runs passes, from the third of a kind on by replaying its graph."""

    def __init__(
        self,
        run: Callable[[Batch, Tensor], Values],
        make_recorder: Callable[[], Recorder],
        device: torch.device,
        *,
        strict: bool,
    ) -> None:
        """run: (batch, weight []) on the device → results. strict: a pass that cannot be recorded raises UserError;
        else its kind is run as it is, which is logged."""
        self._run, self._make_recorder, self._device, self._strict = run, make_recorder, device, strict
        self._recorder = make_recorder()
        self._kinds: dict[Hashable, _Kind] = {}

    def __call__(self, batch: Batch, weight: float, settings: Hashable) -> Values:
        """The results of a pass of a batch on the CPU, valid until the next call. settings: the objective's."""
        shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(batch.items()))
        kind = self._kinds.get((settings, shapes))
        if kind is None:
            kind = self._kinds[settings, shapes] = _Kind(batch, self._device)
        kind.fill(batch, weight)
        if kind.replay is not None:
            kind.replay()
        elif kind.stays or kind.count <= NUM_EAGER:
            self._rehearse(kind)
        else:
            began = time.perf_counter()
            kind.results, kind.replay = self._recorder.record(kind.bind(self._run))
            kind.replay()
            seconds = time.perf_counter() - began
            logger.info("a pass of %s is recorded as a CUDA graph (%.1f s)", _told(batch), seconds)
        return kind.results

    def clear(self) -> None:
        """Forget what was recorded, and free its memory. A pool whose graphs are gone cannot be used again."""
        self._kinds.clear()
        self._recorder = self._make_recorder()

    def _rehearse(self, kind: _Kind) -> None:
        run = kind.bind(self._run)
        try:
            kind.results = self._recorder.rehearse(run, strict=kind.count == NUM_EAGER)
        except WaitsForGpuError as error:
            if self._strict:
                raise UserError(
                    f"resources.cuda_graphs is on, but a pass of this stage waits for the GPU ({error}), which cannot "
                    "be recorded; set it to auto or off"
                ) from error
            logger.warning(
                "passes of %s are not recorded as a CUDA graph: they wait for the GPU (%s)", _told(kind.inputs), error
            )
            kind.stays = True
            kind.results = self._recorder.rehearse(run, strict=False)  # nothing was added up before it stopped


class _Kind:
    """The inputs of a kind of pass, at fixed addresses, and its graph."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.inputs = {name: torch.empty_like(value, device=device) for name, value in batch.items()}
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.count, self.stays = 0, False
        self.replay: Callable[[], None] | None = None
        self.results: Values = {}

    def fill(self, batch: Batch, weight: float) -> None:
        """Copy the inputs, which overlaps with the device's work."""
        for name, value in batch.items():
            source = value.pin_memory() if self.weight.is_cuda else value
            self.inputs[name].copy_(source, non_blocking=True)
        self.weight.fill_(weight)
        self.count += 1

    def bind(self, run: Callable[[Batch, Tensor], Values]) -> Run:
        return lambda: run(self.inputs, self.weight)


class PassRecorder(decoding.CudaRecorder):
    """As the student's own recorder, for passes of training."""

    def record(self, run: Run) -> tuple[Values, Callable[[], None]]:
        """See `Recorder`. Raises UserError where a pass cannot be recorded."""
        WATCH.settle()  # while recording, it may not even ask whether a copy has arrived
        try:
            results, replay = super().record(run)
        except NotRecordedError as error:
            raise UserError(
                f"resources.cuda_graphs: a training pass could not be recorded as a CUDA graph ({error}); set it to off"
            ) from error
        return results, replay


def _told(batch: Batch) -> str:
    return "×".join(map(str, batch["input_ids"].shape)) + " tokens"
