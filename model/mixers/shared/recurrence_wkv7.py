"""The RWKV-7 recurrence as mixers call it: with padding, in parallel or by a step. An exported model carries this
file."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from radlads.kernels.mixer_ops import DeltaOperands, Operands
from radlads.kernels.wkv7 import wkv7, wkv7_delta_step
from radlads.kernels.wkv7.decay_range import WATCH
from radlads.model.mixers.shared.mixer import MixerState
from radlads.model.mixers.shared.recurrence import run_recurrence


def run_wkv7(
    r_BTHK: Tensor,
    operands: Operands | DeltaOperands,
    *,
    state: MixerState | None,
    keep_BT: Tensor | None,
    cu_seqlens: Tensor | None,
    output_state: bool,
    training: bool,
    row_part: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """`(out [B,T,H,V], state [B,H,K,V] fp32 or None)`; see `run_recurrence`. Padding neither decays nor writes.

    operands: `DeltaOperands` for a step (`is_step`), else `Operands`.
    """
    log_decay, k, v, *removal = operands
    if keep_BT is not None:
        keep = keep_BT[..., None, None].to(k.dtype)
        log_decay, k, *removal = (x * keep for x in (log_decay, k, *removal))
    # A design's log decay is between -e^-offset and 0.
    with nullcontext() if torch.compiler.is_compiling() else WATCH.bounded():
        return run_recurrence(
            wkv7,
            wkv7_delta_step,
            (r_BTHK, log_decay, k, v, *removal),
            state=state,
            cu_seqlens=cu_seqlens,
            output_state=output_state,
            training=training,
            row_part=row_part,
        )
