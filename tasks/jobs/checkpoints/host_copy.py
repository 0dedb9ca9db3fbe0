"""Copies of a rank's state in host memory: what training waits for at a checkpoint.

A checkpoint is the state of one step, so the copy must be whole before the next step begins. The memory is kept from
one checkpoint to the next, in buffers of a file each, pinned where a GPU is copied from. Where it does not fit, there
is one buffer, which each file passes through while training waits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from radlads.tasks.jobs.checkpoints.state_slices import ELEMENT_BYTES, StateSlice

FILE_BYTES = 512 << 20
"""Of a file and of its buffer. A power of two: torch rounds pinned allocations up to one."""
FILE_ELEMENTS = FILE_BYTES // ELEMENT_BYTES
_USABLE = 0.8  # of the memory that is available; the rest is for what the job itself allocates later
_GROUP = Path("/sys/fs/cgroup")

File = Sequence[StateSlice]


class HostCopy:
    """Host memory for the state of one rank. ranks: of this job on this machine; they share its memory."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._buffers: list[Tensor] = []
        self._allocating: threading.Thread | None = None

    @property
    def allocated(self) -> int:
        """Bytes of host memory held."""
        self._wait()
        return sum(buffer.nbytes for buffer in self._buffers)

    def prepare(self, files: Sequence[File]) -> None:
        """Begin to allocate what `take` will need, if it fits. Pinning takes about a second for a gigabyte, for which
        training would stand still at its first checkpoint; kernels are compiled meanwhile."""
        if self.fits(files):
            self._allocating = threading.Thread(target=self._allocate, args=(files,), daemon=True)
            self._allocating.start()

    def fits(self, files: Sequence[File]) -> bool:
        """Whether all files have a buffer, or may be given one beside those of the machine's other ranks."""
        missing = sum(_numbers(file) * 4 for file in files) - self.allocated
        return missing <= 0 or has_room(missing, self._ranks)

    def take(self, files: Sequence[File]) -> list[Tensor]:
        """Copy everything; the copies are complete on return. One tensor a file: of each slice all kinds."""
        self._wait()
        copies = [self._copy(file, index) for index, file in enumerate(files)]
        for file in files:
            _finish(file)
        return copies

    def stream(self, files: Sequence[File]) -> Iterator[Tensor]:
        """The same copies one after the other, in one buffer: each is valid until the next is asked for."""
        self._wait()
        for file in files:
            copied = self._copy(file, 0)
            _finish(file)
            yield copied

    def _allocate(self, files: Sequence[File]) -> None:
        with contextlib.suppress(RuntimeError):  # no memory: raised when `take` asks for it
            for index, file in enumerate(files):
                self._buffer(file, index)

    def _wait(self) -> None:
        if self._allocating is not None:
            self._allocating.join()
            self._allocating = None

    def _buffer(self, file: File, index: int) -> Tensor:
        count = _numbers(file)
        if index == len(self._buffers):
            self._buffers.append(torch.empty(0))
        if self._buffers[index].numel() < count:
            self._buffers[index] = torch.empty(count, pin_memory=file[0].tensors["param"].is_cuda)
        return self._buffers[index][:count]

    def _copy(self, file: File, index: int) -> Tensor:
        copied, place = self._buffer(file, index), 0
        for piece in file:
            for tensor in piece.tensors.values():
                copied[place : place + piece.numel].copy_(tensor, non_blocking=True)
                place += piece.numel
        return copied


def has_room(size: int, ranks: int) -> bool:
    """Whether each of the ranks of this machine may hold a copy of `size` bytes."""
    return size * ranks <= _USABLE * spare_memory()


def spare_memory() -> int:
    """Bytes of host memory that this process may still use: the machine's, or its control group's if that is less."""
    spare = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        figures = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        cached = int(figures["inactive_file"])  # given up when the memory is needed
        return spare if limit == "max" else min(spare, int(limit) - int(used) + cached)
    except (OSError, ValueError, KeyError):  # no control group, or an older kind
        return spare


def _finish(file: File) -> None:
    """Wait until what was copied from a GPU has arrived."""
    if file and file[0].tensors["param"].is_cuda:
        torch.cuda.synchronize(file[0].tensors["param"].device)


def _numbers(file: File) -> int:
    return sum(len(piece.kinds) * piece.numel for piece in file)
