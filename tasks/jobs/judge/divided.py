"""ZeRO-3 without training: networks whose layers are divided over the ranks, each gathered while it runs.

Embeddings, final norms and heads are whole on every rank. Each pass of a divided network is collective: ranks that need
different numbers of passes run them inside `in_step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from radlads.model.teacher.family import backbone
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.train.engines.partition import layers, outside_units

Network = TypeVar("Network", bound=PreTrainedModel)


def divides(job: Job) -> bool:
    """Whether a job's networks are divided: under ZeRO-3 on several ranks."""
    return job.spec.resources.zero_stage == 3 and job.world_size > 1


def loading_device(job: Job) -> torch.device:
    """Where a network is loaded: what will be divided stays in its files' pages, which a machine's ranks share."""
    return torch.device("cpu") if divides(job) else job.device


def hold(job: Job, network: Network, apart: Iterable[nn.Module] = ()) -> Network:
    """A loaded network on this rank's device, its layers divided over the ranks where the job divides. Collective.

    apart: modules inside layers that run without their layer too, and so are gathered by themselves.
    """
    if not divides(job):
        return network
    mesh = init_device_mesh(job.device.type, (job.world_size,))
    for module in (*apart, *layers(network)):
        if next(module.parameters(), None) is not None:
            fully_shard(module, mesh=mesh)
    whole = {parameter for part in outside_units(network) for parameter in part.parameters(recurse=False)}
    for parameter in whole:
        parameter.data = parameter.data.to(job.device)
    fully_shard(backbone(network), mesh=mesh, ignored_params=whole)
    _run_a_token(network)  # torch takes what runs first for the outermost module
    return network


def is_divided(network: PreTrainedModel) -> bool:
    """Whether `hold` divided it."""
    return isinstance(getattr(network, "model", None), FSDPModule)


@contextmanager
def in_step(*networks: PreTrainedModel) -> Iterator[None]:
    """Inside, each rank runs the networks as often as it needs, always one after the other in this order. A rank that
    leaves runs a token through divided networks until all ranks leave. Collective."""
    if not is_divided(networks[0]):
        yield
        return
    device = networks[0].device

    def announce(*_: Any) -> None:
        distributed.all_reduce(torch.ones((), device=device))

    handle = backbone(networks[0]).register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while _others_run(device):
        for network in networks:
            _run_a_token(network)


def _others_run(device: torch.device) -> bool:
    """Whether a rank begins another pass, where this one has none left."""
    running = torch.zeros((), device=device)
    distributed.all_reduce(running)
    return bool(running > 0)


@torch.no_grad()
def _run_a_token(network: PreTrainedModel) -> None:
    backbone(network)(torch.zeros(1, 1, dtype=torch.int64, device=network.device), use_cache=False)
