"""The operators of mixer_ops on the meta device: shapes, and what the Triton forms keep for their backward passes (see
kernels/shared/meta.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from radlads.kernels.mixer_ops.plain import Operands


def wkv7_operands_meta(k_BTGK: Tensor, v: Tensor, w_low_BTA: Tensor, *others: Tensor, **options: Any) -> Operands:
    """As `wkv7_operands`. Keeps its inputs."""
    shape = (*k_BTGK.shape[:2], -1, k_BTGK.shape[-1])
    like = [w_low_BTA.to(options["decay_dtype"]).view(shape), *[w_low_BTA.view(shape)] * 4]
    return Operands(*_KeptInputs.apply(like, *_tensors((k_BTGK, v, w_low_BTA, *others, *options.values()))))


def wkv7_finish_meta(y_BTHK: Tensor, **options: Any) -> Tensor:
    """As `wkv7_finish`. Keeps its inputs."""
    return _KeptInputs.apply([y_BTHK.flatten(-2)], *_tensors((y_BTHK, *options.values())))[0]


def _tensors(given: tuple[Any, ...]) -> list[Tensor]:
    flat = [x for part in given for x in (part if isinstance(part, tuple) else (part,))]
    return [x for x in flat if isinstance(x, Tensor)]


class _KeptInputs(torch.autograd.Function):
    """Outputs like those of a list, and a node of the graph that keeps the inputs."""

    @staticmethod
    def forward(ctx: FunctionCtx, like: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return tuple(torch.empty_like(x) for x in like)
