"""The engine under ZeRO-2 and 3: parameters, gradients and optimizer divided over the ranks by torch's `fully_shard`.

Each rank's AdamW moves its own parts, fp32 masters. Gradients are averaged over the ranks in fp32, under ZeRO-2 in the
precision of the pass, and added up in fp32. Step, clip and the check for finite numbers are the other engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.jobs.checkpoints.state_slices import MOMENTS, StateSlice
from radlads.tasks.jobs.train.engines.engine import Engine, adamw
from radlads.tasks.jobs.train.engines.parameter_groups import optimizer_groups, select_trainable
from radlads.tasks.jobs.train.engines.partition import Partitioned, free_gathered, gather_student, part_start


class ShardedEngine(Engine):
    """An Engine whose networks are divided over the ranks."""

    def __init__(
        self,
        objective: Any,
        section: Training,
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: int,
        num_micro: int,
        gathered_once: bool = False,
    ) -> None:
        """As Engine; the objective's networks are on the CPU. gathered_once: as in Partitioned."""
        chosen = select_trainable(objective, section)
        self.module = Partitioned(objective, device=device, dtype=dtype, gathered_once=gathered_once)
        self.device, self.clip, self.objective = device, section.optimizer.clip, objective
        self.micro_batch, self.num_micro = micro_batch, num_micro
        divided: dict[str, Any] = dict(objective.student.named_parameters())
        self.parameters = {name: divided[name] for name, _ in chosen["mixer"] + chosen["rest"]}
        self._parts: dict[Any, nn.Parameter] = {
            divided[name]: nn.Parameter(divided[name].to_local()) for name in self.parameters
        }
        groups = optimizer_groups(
            {group: [(name, divided[name]) for name, _ in named] for group, named in chosen.items()}, section.optimizer
        )
        for group in groups:
            group["params"] = [self._parts[parameter] for parameter in group["params"]]
        self._adam = adamw(groups, section.optimizer)
        self._sharded, self._offloaded = True, False
        self._make_state()

    def forward(self, batch: Any) -> Any:
        return self.module(batch)

    def _backward(self, loss: Tensor) -> None:
        (loss / self.num_micro).backward()

    def _between(self) -> None:
        """Nothing: gradients add up by themselves."""

    def _move(self) -> None:
        self._adam.step()
        for parameter, part in self._parts.items():
            parameter.grad = part.grad = None
        self.settle()

    def _gradients(self) -> list[Tensor]:
        for parameter, part in self._parts.items():
            gradient: Any = parameter.grad
            part.grad = torch.zeros_like(part) if gradient is None else gradient.to_local()
        return [part.grad for part in self._parts.values() if part.grad is not None]

    def _link_state(self) -> None:
        """Nothing to link: the optimizer's own state is the state."""

    def accumulate(self, micro_batch: int, num_micro: int) -> None:
        self.micro_batch, self.num_micro = micro_batch, num_micro

    def reading(self, rank: int) -> AbstractContextManager[Callable[[str], Tensor] | None]:
        return gather_student(self.module, rank)

    def _held(self) -> list[StateSlice]:
        rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
        slices = []
        for name, parameter in self.parameters.items():
            part = self._parts[parameter]
            kinds = {"param": part.detach()} | {key: self._adam.state[part][key] for key in MOMENTS}
            if part.numel() > 0:
                start = part_start(parameter, rank, num_ranks)
                slices.append(StateSlice(name, start, {kind: tensor.view(-1) for kind, tensor in kinds.items()}))
        return slices

    def settle(self) -> None:
        """The masters are the parameters; what was gathered before they were written to is freed."""
        free_gathered(self.module)
