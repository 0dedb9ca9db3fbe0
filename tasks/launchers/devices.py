"""This machine's devices, detected without torch, and a recipe's `resources` resolved for them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Resources

_MOST_GPUS = 4096
_MOST_GIB = 100_000


def count_gpus(visible: str | None) -> int:
    """Number of GPUs. visible: CUDA_VISIBLE_DEVICES, which overrides the installed GPUs; None if it is not set."""
    if visible is not None:
        return len(visible_gpus(visible))
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        pass
    else:
        if listing.returncode == 0:
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    nvidia = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if nvidia:
        return len(nvidia)
    if Path("/dev/kfd").exists():  # AMD
        return len(list(Path("/dev/dri").glob("renderD*")))
    return 0


def visible_gpus(visible: str | None) -> tuple[str, ...]:
    """The names in CUDA_VISIBLE_DEVICES, up to the first -1; empty if it is not set."""
    names = [name.strip() for name in (visible or "").split(",")]
    return tuple(names[: names.index("-1")] if "-1" in names else [name for name in names if name])


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def resolve_resources(requested: Resources, *, num_gpus: int, num_cores: int) -> JobResources:
    """Resolve a recipe's resources for a machine. Raises UserError if they exceed the machine's."""
    device = requested.device if requested.device != "auto" else ("cuda" if num_gpus else "cpu")
    if device == "cuda" and num_gpus == 0:
        raise UserError("resources.device is 'cuda', but this machine has no visible GPU; use 'auto' or 'cpu'")
    processes = requested.processes if requested.processes != "auto" else (num_gpus if device == "cuda" else 1)
    if processes < 1:
        raise UserError(f"resources.processes is {processes}; it must be at least 1")
    if device == "cuda" and processes > num_gpus:
        raise UserError(f"resources.processes is {processes}, but this machine has {num_gpus} visible GPU(s)")
    return JobResources(
        device=device,
        processes=processes,
        zero_stage=requested.zero_stage,
        threads=requested.threads or max(1, num_cores // processes),
        offload_optimizer=requested.offload_optimizer,
        cuda_graphs=requested.cuda_graphs,
        gpu_memory_gib=requested.gpu_memory_gib,
        dollars_per_gpu_hour=requested.dollars_per_gpu_hour,
    )


def planned_resources(requested: Resources, gpus: int | None, gpu_memory_gib: float | None) -> JobResources | None:
    """The resources of a machine that is only planned for, given by a number of GPUs and their memory; None if neither
    is given, here or in the recipe. Raises UserError if one is missing or out of range."""
    memory = requested.gpu_memory_gib if gpu_memory_gib is None else gpu_memory_gib
    if gpus is None and memory is None:
        return None
    count = gpus if gpus is not None else (requested.processes if requested.processes != "auto" else 1)
    if not 1 <= count <= _MOST_GPUS:
        raise UserError(f"{count} GPUs cannot be planned for; give --gpus a number from 1 to {_MOST_GPUS}")
    if memory is None:
        raise UserError(f"the memory of each of the {count} GPUs is unknown; add --gpu-memory, in GiB")
    if not 0 < memory <= _MOST_GIB:
        raise UserError(
            f"a GPU of {memory:g} GiB cannot be planned for; give --gpu-memory more than 0 and at most {_MOST_GIB} GiB"
        )
    return JobResources(
        device="cuda",
        processes=count,
        zero_stage=requested.zero_stage,
        threads=requested.threads or 1,
        offload_optimizer=requested.offload_optimizer,
        cuda_graphs=requested.cuda_graphs,
        gpu_memory_gib=memory,
        dollars_per_gpu_hour=requested.dollars_per_gpu_hour,
    )
