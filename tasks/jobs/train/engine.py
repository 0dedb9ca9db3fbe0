"""One optimizer step over DeepSpeed: forward, backward, check for finite values on all ranks, clip, AdamW.

DeepSpeed shares the gradients and the optimizer among the ranks (ZeRO-0/1/2) and keeps fp32 masters of bf16
parameters. The norm, the clip and the check for finite numbers are ours: one small all-reduce and one transfer to the
host a step carry the norm, the loss, the metrics, the count of labels and the request to stop.

Loss and gradient of a step are the means over its labels, whichever forward pass of whichever rank held them. DeepSpeed
gives every forward pass the same part, so each is weighed by the share of its tokens that are labels, which is
known from the batch on the CPU; gradient and metrics are divided by the share of the whole step, known after the
all-reduce. Where every token is a label, all of these are exactly 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Training
from radlads.tasks.jobs.exit_reasons import NonFiniteError
from radlads.tasks.jobs.train.deepspeed_import import import_deepspeed
from radlads.tasks.jobs.train.parameter_groups import Named, optimizer_groups, select_trainable

if TYPE_CHECKING:
    from radlads.tasks.jobs.data.loader import Batch

logger = logging.getLogger("radlads")

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 50_000_000
"""Gradient elements in one reduction."""


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
        self.device, self.clip = device, section.optimizer.clip
        self.micro_batch, self.num_micro = micro_batch, num_micro
        self._adam = _adamw(chosen, section)
        stage = 2 if offload else _usable_stage(zero_stage, dtype)
        config = _config(stage, dtype, micro_batch, num_micro, self._elements())
        if offload:
            config = _offloaded(config, pin_memory=device.type == "cuda")
        self._engine = _initialize(objective.to(device), self._adam, config)
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
            loss, metrics = self._engine(
                {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            )
            for name, value in ({"loss": loss} | metrics).items():
                seen[name] = seen.get(name, 0) + share * value.detach().double() / self.num_micro
            self._engine.backward(share * loss)
            if index < self.num_micro - 1:
                self._engine.step()
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
        self._engine.step()
        if self._offloaded:
            for gradient in self._gradients():
                gradient.zero_()  # a parameter unused in the next step must not keep this step's gradient
        return result

    def abandon(self) -> None:
        """Leave a step that raised NonFiniteError. Moments decay and counters go on, so a restore must follow."""
        for gradient in self._gradients():
            gradient.zero_()
        for group in self._adam.param_groups:
            group["lr"] = 0.0
        self._engine.step()

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
        """Multiply this rank's part of the gradient."""
        if factor != 1:
            torch._foreach_mul_(self._gradients(), factor)

    def _elements(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    # State, by parameter name

    def adam_steps(self) -> int:
        """Number of optimizer steps taken."""
        return max((int(state["step"]) for state in self._adam.state.values()), default=0)

    def read(self, name: str) -> dict[str, Tensor]:
        """A parameter's fp32 master (`param`) and its two Adam moments, whole. Every rank calls it, in one order."""
        parameter = self.parameters[name]
        if not self._sharded:
            state = self._adam.state[parameter]
            return {"param": parameter.detach(), **{key: state[key] for key in MOMENTS}}
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return {"param": safe_get_full_fp32_param(parameter), **moments}

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
        for name in self.parameters:
            tensors = self.read(name)
            self.write(name, tensors | {key: torch.zeros_like(tensors[key]) for key in MOMENTS})
        self.set_adam_steps(0)

    def set_adam_steps(self, count: int) -> None:
        """Set the optimizer's counters to `count` steps."""
        for state in self._adam.state.values():
            state["step"].fill_(count)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Restore the values of `read`. Every rank writes every parameter whole."""
        parameter = self.parameters[name]
        with torch.no_grad():
            parameter.copy_(tensors["param"])
            if not self._sharded:
                for key in MOMENTS:
                    self._adam.state[parameter][key].copy_(tensors[key])
                return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, tensors["param"].to(self.device))
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, tensors[key].to(self.device), key)


def _adamw(chosen: dict[str, Named], section: Training) -> torch.optim.AdamW:
    options = section.optimizer
    groups = optimizer_groups(chosen, options)
    return torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.eps, fused=True)


def _usable_stage(requested: int, dtype: torch.dtype) -> int:
    """ZeRO-2 for bf16, whatever stage is set: the same training, in the only form that DeepSpeed computes correctly.

    Its stage 0 starts Adam's counter at 1, so that the first updates are too small. Its stage 1 sums micro-batches
    in bf16, or uses another optimizer class, which checks for finite numbers too late.
    """
    if dtype == torch.bfloat16 and requested < 2:
        logger.info("ZeRO-%d runs as ZeRO-2: with bf16, only it adds gradients up in fp32 and counts from 0", requested)
        return 2
    return requested


def _config(stage: int, dtype: torch.dtype, micro_batch: int, num_micro: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration, with its own clipping, overflow check, rates and printing off."""
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero |= {
            "contiguous_gradients": True,
            "overlap_comm": False,  # it waits for the device after every backward pass
            "reduce_bucket_size": max(2, min(BUCKET_ELEMENTS, elements)),
            "allgather_bucket_size": 2 * max(1, min(BUCKET_ELEMENTS, elements) // 2),
            "compute_grad_norm": False,
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype == torch.bfloat16:
        config |= {
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return config


def _offloaded(config: dict[str, Any], *, pin_memory: bool) -> dict[str, Any]:
    """The configuration with the optimizer in host memory, stepped by torch's fused AdamW on the CPU.

    DeepSpeed's own CPU Adam needs a compiler on every machine and is slower than torch's fused one (tried on x86 with
    10 M parameters: 259 against 57 ms a step).
    """
    zero = config["zero_optimization"] | {
        "offload_optimizer": {"device": "cpu", "pin_memory": pin_memory},
        "compute_grad_norm": True,  # DeepSpeed requires it; this module's norm is used for clipping
    }
    return config | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


def _initialize(objective: nn.Module, adam: torch.optim.AdamW, config: dict[str, Any]) -> Any:
    deepspeed = import_deepspeed()
    return deepspeed.initialize(model=objective, optimizer=adam, config=config, dist_init_required=False)[0]
