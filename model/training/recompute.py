"""Selective activation checkpointing: the backward pass computes again what costs little arithmetic (2205.05198, §5).

In a mixer of the RWKV-7 family that is all between its wide projections (`Rwkv7Mixer.recur`: second factors of low-rank
maps, operands, the recurrence, its norm and gates), in an MLP the activation and its product. What a layer keeps are
the outputs of its projections. Their products are not repeated: a region ends with one, and torch stops repeating it
where the last tensor is there that a backward pass reads, before that product runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radlads.model.mixers.shared.family_code import is_llama_mlp
from radlads.model.mixers.shared.rwkv7_design import Rwkv7Mixer
from radlads.model.training.fused_modules import finish_mlp


def recompute_cheap(model: nn.Module) -> None:
    """Let a model do so in training, in place; after `fuse_modules`. Modules of other kinds keep what they did."""
    for module in model.modules():
        if isinstance(module, Rwkv7Mixer):
            region: Any = module
            region.recur = partial(_again, module, module.recur)
        elif is_llama_mlp(module):
            region = module
            region.forward = partial(_mlp, module, module.forward)


def _mlp(module: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return run(x)
    out: Tensor = _again(module, partial(finish_mlp, module), module.gate_proj(x), module.up_proj(x))
    return out


def _again(module: nn.Module, region: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    if not module.training:
        return region(*args, **keywords)
    # Nothing in a region is random: no random state is saved, which a CUDA graph could not record.
    return checkpoint(region, *args, use_reentrant=False, preserve_rng_state=False, **keywords)
