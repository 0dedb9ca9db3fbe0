"""One optimizer step over DeepSpeed: forward, backward, check for finite values on all ranks, clip, AdamW.

DeepSpeed shares the gradients and the optimizer among the ranks (ZeRO-0 and 1, and 2 with an offloaded optimizer) and
keeps fp32 masters of bf16 parameters. The norm, the clip and the check for finite numbers are ours: one small all-
reduce and one transfer to the host a step carry the norm, the loss, the metrics, the count of labels and the request to
stop.

Loss and gradient of a step are the means over its labels, whichever forward pass of whichever rank held them. DeepSpeed
gives every forward pass the same part, so each is weighed by the share of its tokens that are labels, which is
known from the batch on the CPU; gradient and metrics are divided by the share of the whole step, known after the
all-reduce. Where every token is a label, all of these are exactly 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Optimizer, Training
from radlads.tasks.jobs.checkpoints.state_slices import (
    MOMENTS,
    StateSlice,
    equal_share,
    partition_slices,
    whole_slices,
)
from radlads.tasks.jobs.exit_reasons import NonFiniteError
from radlads.tasks.jobs.train.engines.deepspeed_config import build_config, initialize, offloaded, usable_stage
from radlads.tasks.jobs.train.engines.parameter_groups import optimizer_groups, select_trainable
from radlads.tasks.jobs.train.engines.weight_average import WeightAverage

if TYPE_CHECKING:
    from radlads.tasks.jobs.data.loader import Batch

logger = logging.getLogger("radlads")


@dataclass(frozen=True)
class StepResult:
    """Results of a step, averaged over the labels of all its forward passes on all ranks."""

    metrics: dict[str, float]
    grad_norm: float
    """Norm over all trainable parameters, before clipping."""
    stop: bool
    """A rank received the request to stop."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; the copy overlaps with the device's work."""
    if device.type == "cpu":
        return batch
    return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}


class Engine:
    """A DeepSpeed engine around an Objective."""

    average: WeightAverage | None = None

    def __init__(
        self,
        objective: nn.Module,
        section: Training,
        *,
        device: torch.device,
        dtype: torch.dtype,
        zero_stage: int,
        micro_batch: int,
        num_micro: int,
        offload: bool = False,
    ) -> None:
        """Needs an open process group. micro_batch: sequences of a forward pass; num_micro: forward passes of a step.

        offload: the optimizer, its masters and its moments live in host memory; ZeRO-2 whatever stage is set.
        """
        chosen = select_trainable(objective, section)
        self.parameters = dict(chosen["mixer"] + chosen["rest"])
        for parameter in self.parameters.values():
            parameter.data = parameter.data.contiguous()  # its state is handed out as slices of the flattened one
        self.device, self.clip = device, section.optimizer.clip
        self.micro_batch, self.num_micro = micro_batch, num_micro
        self._adam = adamw(optimizer_groups(chosen, section.optimizer), section.optimizer)
        stage = 2 if offload else usable_stage(zero_stage, dtype)
        config = build_config(stage, dtype, micro_batch, num_micro, self._elements())
        if offload:
            config = offloaded(config, pin_memory=device.type == "cuda")
        self._engine = initialize(objective.to(device), self._adam, config)
        self._sharded, self._offloaded = stage > 0, offload
        self.objective: Any = objective
        self._make_state()

    def step(self, batches: Iterable[Batch], rates: Mapping[str, float], number: int, *, stop: bool) -> StepResult:
        """Optimizer step `number`, of batches on the CPU, all of one context and none larger than micro_batch.

        Raises NonFiniteError, and UserError for a step without a label, on every rank before the optimizer moves.
        """
        self.objective.train()
        seen: dict[str, Tensor] = {}
        labelled = 0.0
        for index, batch in enumerate(batches):
            tokens = self.micro_batch * (batch["input_ids"].shape[1] - 1)
            share = self.objective.num_labels(batch) / tokens
            labelled += share
            for name, value in self._pass(batch, share).items():
                seen[name] = seen.get(name, 0) + value
            if index < self.num_micro - 1:
                self._between()
        result, share = self._agree(seen, labelled, stop)
        if share == 0:
            raise UserError(
                f"step {number}: none of its tokens is a label, so there is nothing to learn from it; the optimizer "
                "did not move. Use a larger batch or context, or data with more of what counts"
            )
        if not (math.isfinite(result.grad_norm) and math.isfinite(result.metrics["loss"])):
            raise NonFiniteError(
                f"step {number}: loss {result.metrics['loss']}, gradient norm {result.grad_norm}. The optimizer did "
                "not move, the newest checkpoint is sound; lower the learning rate, or look at the data of this step"
            )
        self._scale(min(1.0, self.clip / (result.grad_norm + 1e-6)) / share)
        for group in self._adam.param_groups:
            group["lr"] = rates[group["name"]] * group["multiplier"]
        self._move()
        if self.average is not None:
            self.average.update(number)
        return result

    def _pass(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """Forward and backward of a batch on the CPU: adds its gradient, returns loss and metrics, fp64. Both are
        weighted by its share of a pass's tokens that are labels, over num_micro."""
        loss, metrics = self.forward({key: value.to(self.device, non_blocking=True) for key, value in batch.items()})
        self._backward(share * loss)
        return {
            name: share * value.detach().double() / self.num_micro for name, value in ({"loss": loss} | metrics).items()
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's `(loss, metrics)` of a batch on the device. Every rank calls it as often."""
        return self._engine(batch)  # type: ignore[no-any-return]

    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of a forward pass, over num_micro and averaged over the ranks."""
        self._engine.backward(loss)

    def _between(self) -> None:
        """After each forward pass of a step but the last."""
        self._engine.step()

    def _move(self) -> None:
        """The optimizer's step."""
        self._engine.step()
        if self._offloaded:
            for gradient in self._gradients():
                gradient.zero_()  # a parameter unused in the next step must not keep this step's gradient

    def abandon(self) -> None:
        """Leave a step that raised NonFiniteError. Moments decay and counters go on, so a restore must follow."""
        for gradient in self._gradients():
            gradient.zero_()
        for group in self._adam.param_groups:
            group["lr"] = 0.0
        self._move()

    def _agree(self, seen: dict[str, Tensor], labelled: float, stop: bool) -> tuple[StepResult, float]:
        """Average over the labels of all ranks, and copy everything to the host at once; also the step's share.

        labelled: the shares of this rank's forward passes, added up.
        """
        world = distributed.get_world_size()
        square = torch.nn.utils.get_total_norm(self._gradients()).double() ** 2
        if not self._sharded:
            square = square / world  # every rank holds the whole gradient
        means = [value.reshape(()).to(self.device) / world for value in seen.values()]
        counts = [torch.full((), x, dtype=torch.float64, device=self.device) for x in (float(stop), labelled)]
        reduced = torch.stack([square.to(self.device), *counts, *means])
        if world > 1:
            distributed.all_reduce(reduced)
        total, stopping, labelled, *values = reduced.tolist()
        share = labelled / (self.num_micro * world)
        if share == 0:
            return StepResult(dict.fromkeys(seen, math.nan), math.nan, stopping > 0), share
        metrics = {name: value / share for name, value in zip(seen, values, strict=True)}
        norm = math.sqrt(total) / share if total >= 0 else math.nan
        return StepResult(metrics, norm, stopping > 0), share

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradient (all of it without ZeRO)."""
        if not self._sharded:
            # Unused in this step: ZeRO treats the gradient as zero, and so does this.
            missing = [parameter for parameter in self.parameters.values() if parameter.grad is None]
            for parameter in missing:
                parameter.grad = torch.zeros_like(parameter)
            return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if self._offloaded:
            self._engine.optimizer._wait_for_offload_copies()
            return [master.grad for master in self._engine.optimizer.single_partition_of_fp32_groups]
        return [gradient for group in self._engine.optimizer.averaged_gradients.values() for gradient in group]

    def _scale(self, factor: float) -> None:
        """Multiply the gradient by a factor as the optimizer's step reads it: its fused form divides by a tensor."""
        adam: Any = self._adam
        # Where its parameters are: torch would copy it there without waiting for the copy.
        place = adam.param_groups[0]["params"][0].device
        adam.grad_scale = None if factor == 1 else torch.full((), 1 / factor, device=place)

    def _elements(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def keep_average(self, decay: float) -> None:
        """From the next step on keep an average of what trains (weight_average.py). Before any restore."""
        self.average = WeightAverage(self._held(), decay)

    def use_average(self) -> None:
        """Put the average in the place of the weights, after the last step. Collective."""
        assert self.average is not None, "kept since the start"
        self.average.replace_masters()
        self.settle()

    def reading(self, rank: int) -> AbstractContextManager[Callable[[str], Tensor] | None]:
        """After the last step: on rank 0, name in the student's state dict → that tensor, whole and on the CPU; None on
        the others. Every rank enters it."""
        state = self.objective.student.state_dict()
        return nullcontext((lambda name: state[name].cpu()) if rank == 0 else None)

    # State, as slices of flattened parameters

    def adam_steps(self) -> int:
        """Number of optimizer steps taken."""
        return max((int(state["step"]) for state in self._adam.state.values()), default=0)

    def held_state(self) -> list[StateSlice]:
        """The masters and moments that this rank holds, and the average if one is kept. Writing to them restores the
        state, see `settle`."""
        held = self._held()
        return held if self.average is None else self.average.beside(held)

    def _held(self) -> list[StateSlice]:
        """The masters and moments alone."""
        if self._sharded:
            return partition_slices(self.parameters)
        return whole_slices(self.parameters, self._adam)

    def own_state(self) -> list[StateSlice]:
        """This rank's part of the state: over all ranks, every element once, divided evenly. No collective."""
        held = self.held_state()
        return held if self._sharded else equal_share(held, distributed.get_rank(), distributed.get_world_size())

    def settle(self) -> None:
        """Make the parameters follow masters that were written to. Collective."""
        if self._sharded:
            self._engine.optimizer.update_lp_params()

    def _make_state(self) -> None:
        """Give the optimizer its state tensors before its first step, as after 0 steps.

        DeepSpeed links them to parameter names once, after the first group has moved, and so misses the other groups.
        """
        owned = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        before = [parameter.grad for parameter in owned]  # with offload: where gradients arrive
        for parameter in owned:
            parameter.grad = torch.zeros_like(parameter)
        self._adam.step()  # at a rate of 0 and without a gradient: nothing moves, and the state is torch's own
        for parameter, gradient in zip(owned, before, strict=True):
            parameter.grad = gradient if self._offloaded else None
        self.set_adam_steps(0)
        self._link_state()

    def _link_state(self) -> None:
        if self._sharded:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def accumulate(self, micro_batch: int, num_micro: int) -> None:
        """Set the sequences of a forward pass and the forward passes of a step. Between steps only."""
        self.micro_batch, self.num_micro = micro_batch, num_micro
        self._engine.set_train_micro_batch_size(micro_batch)
        self._engine.set_train_batch_size(micro_batch * num_micro * distributed.get_world_size())
        self._engine.micro_steps = 0  # DeepSpeed detects a step's last pass by the remainder of this count
        if self._sharded:
            self._engine.optimizer.gradient_accumulation_steps = num_micro

    def forget(self) -> None:
        """Reset the optimizer: moments zero, counters 0; the parameters stay."""
        for one in self.held_state():
            for kind in MOMENTS:
                one.tensors[kind].zero_()
        self.set_adam_steps(0)

    def set_adam_steps(self, count: int) -> None:
        """Set the optimizer's counters to `count` steps."""
        for state in self._adam.state.values():
            state["step"].fill_(count)


def adamw(groups: list[dict[str, Any]], options: Optimizer) -> torch.optim.AdamW:
    """The optimizer of parameter groups (parameter_groups.py)."""
    return torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.eps, fused=True)
