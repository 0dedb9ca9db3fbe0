"""The engine of models that one GPU holds whole: every rank keeps all of the state, in a few flat buffers.

DeepSpeed's hooks and buckets cost the host several launches a parameter and pass; for a small model the GPU waits for
them. Here a pass is a plain function of tensors at fixed addresses, which can be recorded as a CUDA graph
(pass_graphs.py): forward, backward, and the sum of its gradients in fp32. Everything after it (one all-reduce, norm,
clip, AdamW over fp32 masters, rounding to the parameters) works on one tensor for each group of parameters. Step, check
for finite numbers and checkpoints are the other engines'.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from radlads.model.student.decoding.recorder import Recorder
from radlads.model.training.hidden_states import rows_are_whole
from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.jobs.checkpoints.state_slices import MOMENTS, StateSlice
from radlads.tasks.jobs.train.engines.engine import Engine, StepResult, adamw, to_device
from radlads.tasks.jobs.train.engines.parameter_groups import optimizer_groups, select_trainable
from radlads.tasks.jobs.train.engines.pass_graphs import PassGraphs

if TYPE_CHECKING:
    from radlads.tasks.jobs.data.loader import Batch

_ALIGNED = 128  # elements: where a parameter starts in its buffer; kernels want 16 bytes, the copy engine 128


class ReplicatedEngine(Engine):
    """An Engine without ZeRO, hooks or offload."""

    def __init__(
        self,
        objective: Any,
        section: Training,
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: int,
        num_micro: int,
        make_recorder: Callable[[], Recorder] | None = None,
        strict: bool = False,
    ) -> None:
        """As Engine. make_recorder: of what records passes; None: none is. strict: a pass that cannot be recorded
        raises UserError; else it is run as it is, which is logged."""
        chosen = select_trainable(objective, section)
        self.parameters = dict(chosen["mixer"] + chosen["rest"])
        self.device, self.clip, self.objective = device, section.optimizer.clip, objective
        self.micro_batch, self.num_micro = micro_batch, num_micro
        self._sharded, self._offloaded = False, False
        objective.to(device=device, dtype=dtype)
        groups = optimizer_groups(chosen, section.optimizer)
        lengths = [sum(map(_room, group["params"])) for group in groups]
        self._sum = torch.zeros(sum(lengths), dtype=torch.float32, device=device)
        self._sums = list(self._sum.split(lengths))
        self._places: dict[nn.Parameter, tuple[nn.Parameter, int]] = {}
        """Parameter → the master of its group, and where in it the parameter starts."""
        self._rounded: list[tuple[Tensor, nn.Parameter]] = []
        """The parameters of a group, flat, and its master, where these are not the same."""
        for group, length in zip(groups, lengths, strict=True):
            group["params"] = [self._flatten(group["params"], length, dtype)]
        self._adam = adamw(groups, section.optimizer)
        self._make_state()
        for group, gradient in zip(groups, self._sums, strict=True):
            group["params"][0].grad = gradient
        self._trained = list(self._places)
        sums: dict[nn.Parameter, Any] = {master: master.grad for master, _ in self._places.values()}
        self._gradient_of = [self._piece(sums[master], parameter) for parameter, (master, _) in self._places.items()]
        self._graphs = None if make_recorder is None else PassGraphs(self._run, make_recorder, device, strict=strict)

    def _flatten(self, parameters: list[nn.Parameter], length: int, dtype: torch.dtype) -> nn.Parameter:
        """Make parameters pieces of one tensor; returns their master, fp32."""
        flat = torch.zeros(length, dtype=dtype, device=self.device)
        master = nn.Parameter(flat if dtype == torch.float32 else torch.zeros_like(flat, dtype=torch.float32))
        start = 0
        for parameter in parameters:
            self._places[parameter] = master, start
            self._piece(master.detach(), parameter).copy_(parameter.detach())
            start += _room(parameter)
        for parameter in parameters:
            parameter.data = self._piece(flat, parameter)
        if dtype != torch.float32:
            self._rounded.append((flat, master))
            flat.copy_(master.detach())
        return master

    def _piece(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """The piece of a parameter in a tensor that is laid out like its master, in the parameter's shape."""
        start = self._places[parameter][1]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    # A pass

    def forward(self, batch: Batch) -> Any:
        return self.objective(batch)

    def _pass(self, batch: Batch, share: float) -> dict[str, Tensor]:
        weight = share / self.num_micro
        if self._graphs is not None:
            return self._graphs(batch, weight, self.objective.fixed_settings())
        return self._run(to_device(batch, self.device), torch.full((), weight, dtype=torch.float64, device=self.device))

    def _run(self, batch: Batch, weight: Tensor) -> dict[str, Tensor]:
        """A pass on the device; weight [] fp64, of its loss. Nothing here waits for the device, or leaves a tensor
        behind that a later pass reads: no `grad` of a parameter, whose accumulation belongs to a stream of its own."""
        with nullcontext() if "document_ids" in batch else rows_are_whole():
            loss, metrics = self.objective(batch)
        scale = weight.to(loss.dtype).expand_as(loss)
        found = torch.autograd.grad(loss, self._trained, grad_outputs=scale, allow_unused=True)
        used = [(total, one) for total, one in zip(self._gradient_of, found, strict=True) if one is not None]
        torch._foreach_add_([total for total, _ in used], [one for _, one in used])
        seen = {"loss": loss} | metrics
        values = torch.stack([value.detach().double().reshape(()) for value in seen.values()]) * weight
        return dict(zip(seen, values.unbind(), strict=True))

    # The optimizer's step

    def _agree(self, seen: dict[str, Tensor], labelled: float, stop: bool) -> tuple[StepResult, float]:
        world = distributed.get_world_size()
        if world > 1:
            distributed.all_reduce(self._sum)
            self._sum /= world
        return super()._agree(seen, labelled, stop)

    def _gradients(self) -> list[Tensor]:
        return self._sums

    def _between(self) -> None:
        """Nothing: gradients add up by themselves."""

    def _move(self) -> None:
        self._adam.step()
        self._sum.zero_()
        self.settle()

    # State

    def _link_state(self) -> None:
        """Nothing to link: the optimizer's own state is the state."""

    def _held(self) -> list[StateSlice]:
        slices = []
        for name, parameter in self.parameters.items():
            master, _ = self._places[parameter]
            kinds = {"param": master.detach()} | {kind: self._adam.state[master][kind] for kind in MOMENTS}
            slices.append(StateSlice(name, 0, {kind: self._piece(x, parameter).view(-1) for kind, x in kinds.items()}))
        return slices

    def settle(self) -> None:
        for flat, master in self._rounded:
            flat.copy_(master.detach())

    def accumulate(self, micro_batch: int, num_micro: int) -> None:
        self.micro_batch, self.num_micro = micro_batch, num_micro
        if self._graphs is not None:
            self._graphs.clear()  # another phase: its passes are others


def _room(parameter: nn.Parameter) -> int:
    """Elements that a parameter takes in its buffer."""
    return -(-parameter.numel() // _ALIGNED) * _ALIGNED
