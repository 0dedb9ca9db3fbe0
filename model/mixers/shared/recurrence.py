"""How a mixer runs its recurrence: whole sequences, packed documents, or one token on a kept state.

Dims: B batch, T time, H query heads, K key dim, V value dim per head, N packed documents. Needs torch only: an exported
model carries this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from radlads.model.mixers.shared.mixer import MixerState


def run_recurrence(
    operator: Callable[..., tuple[Tensor, Tensor | None]],
    step: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    *,
    state: MixerState | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
    training: bool,
    row_part: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """`(out [B,T,H,V], state [B,H,K,V] fp32 or None)` of an operator of radlads.kernels; inputs [B,T,H,·] or [B,T,H].

    One token on a kept state is a decode step (the state is updated in place); everything else is one parallel pass.
    row_part: as in `MixerContext`; it has the bounds of documents itself. Raises ValueError if both packed documents
    (cu_seqlens) and a state are given.
    """
    B, T = inputs[0].shape[:2]
    if row_part is not None:
        return row_part.run(operator, inputs), None
    if cu_seqlens is not None:
        if state is not None or output_state:
            raise ValueError("packed documents (cu_seqlens) and a recurrent state exclude each other")
        out, _ = operator(*(x.reshape(1, B * T, *x.shape[2:]) for x in inputs), cu_seqlens=cu_seqlens)
        return out.view(B, T, *out.shape[2:]), None
    if is_step(inputs[0], state, training=training):
        return step(*(x[:, 0] for x in inputs), state.recurrent).unsqueeze(1), state.recurrent
    return operator(*inputs, initial_state=None if state is None else state.recurrent, output_final_state=output_state)


def is_step(x: Tensor, state: MixerState | None, *, training: bool) -> bool:
    """Whether x [B,T,...] is one token on a kept state, outside training."""
    return x.shape[1] == 1 and state is not None and not training
