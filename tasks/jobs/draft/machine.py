"""The machine that a recipe is drafted for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from radlads.tasks.contracts.errors import UserError, did_you_mean
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.requests.draft import DraftRequest
from radlads.tasks.jobs.plan.cost import likely_gpu
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS

_PRICES = {
    "H100": 2.5,
    "H200": 3.5,
    "B200": 5.0,
    "A100": 1.5,
    "MI300X": 2.5,
    "MI325X": 3.0,
    "MI250": 1.0,
    "L40S": 1.0,
    "RTX 4090": 0.4,
    "RTX 3090": 0.25,
}
"""Dollars an hour for one GPU, rented on demand: an assumption, for offers vary by more than a factor of two."""


@dataclass(frozen=True)
class Machine:
    """resources: of its jobs. gpu: kind of its GPUs; "" for a CPU or an unknown one. slower: how many times as long it
    takes as the GPU that plans take it for. notes: what is assumed, a line each."""

    resources: JobResources
    gpu: str = ""
    slower: float = 1.0
    notes: tuple[str, ...] = ()


def machine_of(request: DraftRequest) -> Machine:
    """The machine that a request names. Raises UserError for an unknown kind of GPU."""
    if request.gpus == 0:
        return Machine(JobResources(device="cpu", processes=1, zero_stage=1, threads=1))
    kind, memory = _kind(request.gpu), request.gpu_memory_gib
    if memory is None:
        if kind is None:
            raise UserError("the memory of the GPUs is not known; write --gpus as 8xH100, or as 8x80GB")
        memory = float(GPU_KINDS[kind].gibibytes)
    elif kind is None:
        kind = likely_gpu(memory)
    notes, slower, price = [], 1.0, request.price
    if price is None and kind is not None:
        price = _PRICES[kind]
        notes.append(f"${price:g} an hour for one {kind} is assumed; give your provider's with --price")
    planned_as = likely_gpu(memory)
    if kind is not None and planned_as is not None and planned_as != kind:
        slower = GPU_KINDS[planned_as].peak_flops / GPU_KINDS[kind].peak_flops
        notes.append(
            f"plans take a GPU of {memory:g} GiB for one {planned_as}; the {kind} has {1 / slower:.2f} times its "
            f"peak, so times and costs here are {slower:.2g} times what `radlads plan` will print"
        )
    resources = JobResources(
        device="cuda",
        processes=request.gpus,
        zero_stage=1,
        threads=1,
        gpu_memory_gib=memory,
        dollars_per_gpu_hour=price,
    )
    return Machine(resources, kind or "", slower, tuple(notes))


def _kind(name: str) -> str | None:
    """The kind that a user's word means: case, spaces and the maker's name do not matter. Raises UserError."""
    if not name:
        return None

    def plain(word: str) -> str:
        return re.sub(r"[^a-z0-9]|nvidia|amd|geforce|sxm|pcie|instinct", "", word.lower())

    asked = plain(name)
    for kind in GPU_KINDS:
        if plain(kind) == asked or plain(kind).removeprefix("rtx") == asked:
            return kind
    near = did_you_mean(name.upper(), GPU_KINDS, cutoff=0.5)
    raise UserError(
        f"--gpus: '{name}' is no GPU that speeds are known of ({', '.join(GPU_KINDS)}){near}; 8x80GB works too"
    )
