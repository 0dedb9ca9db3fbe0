"""Where the jobs of a run on other machines are: which stay on the flow's, and their folders on the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec
from radlads.tasks.contracts.mirrors.weights_biases import is_wandb
from radlads.tasks.contracts.parsing.credentials import child_environment
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.contracts.stages import PLAN, stage_info
from radlads.tasks.launchers.devices import count_cores
from radlads.tasks.launchers.local import has_ranks

_FORWARDED = ("AWS_", "HF_", "HUGGING_FACE_", "MLFLOW_TRACKING_", "NCCL_")


def machines_resources(requested: Resources, ranks: int, source: str) -> JobResources:
    """The resources of a job whose machines the recipe names; this machine is not looked at. ranks: of all machines.
    source: names them in a message. Raises UserError."""
    if requested.processes not in ("auto", ranks):
        raise UserError(
            f"resources.processes is {requested.processes}, but {source} gives {ranks}; leave it out, or make them "
            "equal"
        )
    return JobResources(
        device="cpu" if requested.device == "cpu" else "cuda",
        processes=ranks,
        zero_stage=requested.zero_stage,
        threads=requested.threads or 1,
        offload_optimizer=requested.offload_optimizer,
        cuda_graphs=requested.cuda_graphs,
        gpu_memory_gib=requested.gpu_memory_gib,
        dollars_per_gpu_hour=requested.dollars_per_gpu_hour,
    )


def runs_here(spec: JobSpec) -> bool:
    """Whether a job runs on the flow's machine: one that computes on no device."""
    return not (stage_info(spec.stage).uses_device or has_ranks(spec))


def on_this_machine(spec: JobSpec) -> JobSpec:
    """A job that runs on the flow's machine, with the cores of that. The plan keeps the resources that it plans for."""
    if spec.stage == PLAN.name:
        return spec
    update = {"device": "cpu", "processes": 1, "threads": count_cores()}
    return spec.model_copy(update={"resources": spec.resources.model_copy(update=update)})


def on_machine(spec: JobSpec, name: str, work: str | None) -> JobSpec:
    """A job as another machine gets it: with a folder of its own there, also where machines share a file system.

    work: the machine's folder for scratch; None: at the path of the flow's. An MLflow database in a file of the flow's
    machine is left out: the flow brings it up to date at the end of the stage.
    """
    own = f"host-{re.sub('[^A-Za-z0-9._-]', '_', name)}"
    scratch = Path(work, f"{spec.stage}-{spec.digest[:16]}") if work else Path(spec.scratch)
    cache = Path(work, "content.json") if work else spec.content_cache and Path(spec.content_cache)
    tracking = spec.tracking if spec.tracking and "://" in spec.tracking.uri.replace("sqlite://", "") else None
    if spec.tracking is not None and is_wandb(spec.tracking.uri):
        tracking = spec.tracking.model_copy(update={"folder": str(scratch / "wandb")})
    return spec.model_copy(
        update={
            "scratch": str(scratch / own),
            "content_cache": str(cache.with_name(f"content-{own}.json")) if cache else None,
            "tracking": tracking,
        }
    )


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job needs on another machine as on this one: credentials, and settings of the network."""
    return {key: value for key, value in environment.items() if key.startswith(_FORWARDED)} | child_environment()
