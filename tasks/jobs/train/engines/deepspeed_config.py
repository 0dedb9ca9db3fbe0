"""DeepSpeed's configuration for ZeRO-0, 1 and 2."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from radlads.tasks.jobs.train.engines.deepspeed_import import import_deepspeed

logger = logging.getLogger("radlads")

BUCKET_ELEMENTS = 50_000_000
"""Gradient elements in one reduction."""


def usable_stage(requested: int, dtype: torch.dtype) -> int:
    """ZeRO-2 for bf16, whatever stage is set: the same training, in the only form that DeepSpeed computes correctly.

    Its stage 0 starts Adam's counter at 1, so that the first updates are too small. Its stage 1 sums micro-batches
    in bf16, or uses another optimizer class, which checks for finite numbers too late.
    """
    if dtype == torch.bfloat16 and requested < 2:
        logger.info("ZeRO-%d runs as ZeRO-2: with bf16, only it adds gradients up in fp32 and counts from 0", requested)
        return 2
    return requested


def build_config(stage: int, dtype: torch.dtype, micro_batch: int, num_micro: int, elements: int) -> dict[str, Any]:
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


def offloaded(config: dict[str, Any], *, pin_memory: bool) -> dict[str, Any]:
    """The configuration with the optimizer in host memory, stepped by torch's fused AdamW on the CPU.

    DeepSpeed's own CPU Adam needs a compiler on every machine and is slower than torch's fused one (tried on x86 with
    10 M parameters: 259 against 57 ms a step).
    """
    zero = config["zero_optimization"] | {
        "offload_optimizer": {"device": "cpu", "pin_memory": pin_memory},
        "compute_grad_norm": True,  # DeepSpeed requires it; this module's norm is used for clipping
    }
    return config | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


def initialize(objective: nn.Module, adam: torch.optim.AdamW, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around a module and an optimizer."""
    deepspeed = import_deepspeed()
    return deepspeed.initialize(model=objective, optimizer=adam, config=config, dist_init_required=False)[0]
