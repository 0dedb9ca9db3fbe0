"""The machines that jobs run on: the flow's own, hosts that are reached by ssh, or a Slurm cluster."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.recipe.base import OPERATIONAL, Place, Section

# Nothing in it can be an option of ssh or a word of a shell.
_LINE = re.compile(
    r"(?P<name>(?:[A-Za-z_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.:_-]{0,252})(?:\s+slots=(?P<slots>[1-9][0-9]{0,3}))?"
)
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,@/-]{0,199}$")]
# A directive is parsed by sbatch, not by a shell; what the launcher itself sets is refused by slurm.py.
_Directive = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(?:=[A-Za-z0-9_.,:+@%/&|*()\[\]=-]+)?$", max_length=500)]


class Remote(Section):
    """Where a job finds things on a machine that is not the flow's."""

    python: Annotated[str | None, OPERATIONAL] = Field(default=None, pattern=r"^/[^\x00-\x1f]+$")
    """The interpreter that has radlads; None: at the path of the flow's own."""
    work: Annotated[str | None, OPERATIONAL] = Field(default=None, pattern=r"^/[^\x00-\x1f]+$")
    """Folder for scratch, best on a local disk; None: at the path of the flow's work folder."""
    interface: Annotated[str | None, OPERATIONAL] = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$")
    """Network interface of the ranks (`ib0`); None: the one with the route to the other hosts."""
    ssh_config: Annotated[Place | None, OPERATIONAL] = None
    """A configuration file of ssh; None: the user's own. Keys, users, ports and jumps are set there."""


class Slurm(Section):
    """The allocation of a job that runs on a GPU. Everything that is not set is the cluster's default."""

    nodes: Annotated[int, OPERATIONAL] = Field(default=1, ge=1, le=4096)
    """Machines of a job."""
    gpus_per_node: Annotated[int, OPERATIONAL] = Field(default=1, ge=1, le=64)
    """With `device: cpu` the number of ranks of a node, for which no GPU is asked."""
    cpus_per_node: Annotated[int | None, OPERATIONAL] = Field(default=None, ge=1, le=4096)
    """CPU cores of each."""
    partition: Annotated[_Word | None, OPERATIONAL] = None
    """As in `sbatch --partition`."""
    account: Annotated[_Word | None, OPERATIONAL] = None
    """As in `sbatch --account`."""
    qos: Annotated[_Word | None, OPERATIONAL] = None
    """As in `sbatch --qos`."""
    time: Annotated[str | None, OPERATIONAL] = Field(default=None, pattern=r"^\d+(-\d+(:\d+){0,2}|(:\d+){0,2})$")
    """Time limit as sbatch writes it: minutes, hours:minutes:seconds, days-hours. A job that reaches it has saved a
    checkpoint before, and is continued by the next attempt."""
    extra: Annotated[tuple[_Directive, ...], OPERATIONAL] = ()
    """More options of sbatch: `--constraint=h100`, `--exclusive`."""


@dataclass(frozen=True)
class Host:
    """A machine as ssh knows it. slots: its number of ranks, each with a GPU of its own unless they compute on the
    CPU."""

    name: str
    slots: int


def parse_hosts(lines: Iterable[str]) -> tuple[Host, ...]:
    """The hosts of DeepSpeed's hostfile: `name slots=8` a line, `#` starts a comment. Raises ValueError, one line."""
    hosts: dict[str, Host] = {}
    for line in lines:
        text = line.partition("#")[0].strip()
        match = _LINE.fullmatch(text)
        if text and match is None:
            raise ValueError(f"'{one_line(text, 60)}' is not a host; a line of a hostfile is `name slots=8`")
        if match is not None:
            if match["name"] in hosts:
                raise ValueError(f"the host {match['name']} is there twice; one line names all its slots")
            hosts[match["name"]] = Host(match["name"], int(match["slots"] or 1))
    if not hosts:
        raise ValueError("there is no host; a line of a hostfile is `name slots=8`")
    return tuple(hosts.values())


class Resources(Section):
    """Hardware settings of jobs. Not in any digest: the same recipe on more GPUs is the same run."""

    launcher: Literal["local", "hosts", "slurm"] = "local"
    """What starts the jobs. local: processes of this machine. hosts: of the machines in `hosts`, over ssh. slurm: batch
    jobs of a cluster."""
    hosts: Annotated[Place | tuple[str, ...] | None, OPERATIONAL] = None
    """DeepSpeed's hostfile, or its lines: `name slots=8`, with one rank a slot. The ranks meet at the first host."""
    slurm: Annotated[Slurm | None, OPERATIONAL] = None
    """The allocation, with `launcher: slurm`."""
    remote: Annotated[Remote, OPERATIONAL] = Remote()
    """Where things are on other machines."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA (or ROCm) where there is a GPU, else the CPU."""
    processes: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Processes of a DeepSpeed job; auto: one per GPU, or one on a CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the GPUs share: 1 the optimizer, 2 gradients too, 3 also the weights of student and teacher, frozen ones
    included, which are then gathered a part of a layer at a time. With bf16, 0 and 1 run as 2."""
    threads: int | None = Field(default=None, gt=0, le=4096)
    """CPU threads per process; None: the cores divided by the number of processes."""
    offload_optimizer: bool = False
    """Keep fp32 masters and Adam moments in host memory and step there. Slower; frees 12 bytes per parameter."""
    cuda_graphs: Literal["off", "auto", "on"] = "off"
    """Record a training pass once and replay it: a model so small that its GPU waits for launches trains faster. Each
    GPU then holds the whole optimizer. auto: up to a billion parameters, where passes can be recorded; on: an error
    where they cannot."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU, for planning without a GPU; None: detected."""
    dollars_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price for the cost in the plan and the report."""

    @model_validator(mode="after")
    def _machines_fit_the_launcher(self) -> Self:
        if (self.hosts is not None) != (self.launcher == "hosts"):
            raise ValueError("`hosts` and `launcher: hosts` need each other: a hostfile, or lines as `name slots=8`")
        if isinstance(self.hosts, tuple):
            parse_hosts(self.hosts)
        if (self.slurm is not None) != (self.launcher == "slurm"):
            raise ValueError("`slurm` and `launcher: slurm` need each other, e.g. slurm: {nodes: 2, gpus_per_node: 8}")
        if self.launcher == "local" and self.remote != Remote():
            raise ValueError("`remote` is for launchers that run jobs on other machines: hosts, slurm")
        if self.launcher != "local" and self.device != "cpu" and self.gpu_memory_gib is None:
            raise ValueError(
                f"with `launcher: {self.launcher}` the plan cannot look at the GPUs; set `gpu_memory_gib` to the "
                "memory of one of them"
            )
        return self
