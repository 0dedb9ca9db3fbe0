"""The distance of a student's residual stream to its teacher's after every decoder layer, as a loss.

    mean over layers l and tokens n of  ‖h_nl − t_nl‖² / ‖t_nl‖²

The quotient is a token's own: a stream grows by orders of magnitude from layer to layer, and a few tokens (the first of
a row) are far longer than the rest, so that a sum of squares would see these alone.

Dims: B batch, T context, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from radlads.kernels.row_distance import squared_distance
from radlads.model.training.hidden_states import decoder_layers
from radlads.tasks.contracts.errors import UserError


class HiddenDistance:
    """Of one pass of the teacher and one of the student after it, each inside its `watch_`.

    The teacher's states [B,T,D] are held from its pass on. Without gradients each is freed as soon as the student's
    layer has run; with them autograd keeps it until the backward pass of that layer.
    """

    def __init__(self) -> None:
        self._wanted: dict[int, Tensor] = {}
        self._out: dict[int, Tensor] = {}
        self._terms: list[Tensor] = []

    def watch_teacher(self, teacher: PreTrainedModel) -> AbstractContextManager[None]:
        return _layer_outputs(teacher, self._wanted.__setitem__)

    def watch_student(self, student: PreTrainedModel) -> AbstractContextManager[None]:
        return _layer_outputs(student, self._take)

    def mean(self) -> Tensor:
        """The distance [], in fp32 or fp64; after both passes. Raises RuntimeError for reentrant checkpoints, whose
        insides have no gradients."""
        if torch.is_grad_enabled() and self._terms:
            raise RuntimeError("hidden_weight needs activation checkpointing with use_reentrant=False")
        for layer in list(self._out):
            self._terms.append(self._term(layer, self._out.pop(layer)))
        return torch.stack(self._terms).mean()

    def _take(self, layer: int, out: Tensor) -> None:
        # With gradients the hook may run inside an activation checkpoint, which would compute its terms again without
        # the hook: it keeps the tensor alone, which the next layer keeps in any case.
        if torch.is_grad_enabled():
            self._out[layer] = out
        else:
            self._terms.append(self._term(layer, out))

    def _term(self, layer: int, out: Tensor) -> Tensor:
        wanted = self._wanted.pop(layer)
        wide = torch.promote_types(wanted.dtype, torch.float32)
        with torch.no_grad():
            size = torch.linalg.vector_norm(wanted, dim=-1, dtype=wide).square().clamp(min=torch.finfo(wide).tiny)
        return (squared_distance(out, wanted) / size).mean()


def check_comparable(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises UserError for networks whose layers cannot be compared one by one."""
    ours, theirs = (
        (len(decoder_layers(network)), network.config.get_text_config().hidden_size) for network in (student, teacher)
    )
    if ours != theirs:
        raise UserError(
            "distill.hidden_weight compares layer with layer, but the student has {} layers of width {} and the "
            "teacher {} of width {}; set it to 0".format(*ours, *theirs)
        )


@contextmanager
def _layer_outputs(network: PreTrainedModel, take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, every decoder layer that ran hands its number and its hidden states [B,T,D] to `take`."""

    def hook(number: int, layer: nn.Module, args: Any, out: Any) -> None:
        take(number, out if isinstance(out, Tensor) else out[0])

    handles = [layer.register_forward_hook(partial(hook, i)) for i, layer in enumerate(decoder_layers(network))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
