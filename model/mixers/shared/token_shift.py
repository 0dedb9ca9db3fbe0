"""The previous token of every token: across calls, padding and packed documents.

Dims: B batch, T time, D model width, N packed documents. Needs torch only: an exported model carries this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def previous_tokens(
    x_BTD: Tensor,
    *,
    last_BD: Tensor | None = None,
    keep_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    row_part: Any = None,
) -> tuple[Tensor, Tensor]:
    """`(previous [B,T,D], last [B,D])`: x one token earlier, and the last input, to be kept as state.

    Zeros come before the first token of a sequence, or `last_BD`, where an earlier call left off. keep_BT: False at
    padding, which is skipped over: it is nobody's previous token. cu_seqlens: int [N+1], document bounds in the
    flattened [B·T] (row bounds included); no document sees the one before it. row_part: as in `MixerContext`; what
    comes before is then the last input of the rank before, or zeros where a document begins.
    """
    B, T, D = x_BTD.shape
    if row_part is not None:
        last_BD = row_part.before(x_BTD[:, -1])
    before_B1D = x_BTD.new_zeros(B, 1, D) if last_BD is None else last_BD.to(x_BTD.dtype).unsqueeze(1)
    with_before = torch.cat((before_B1D, x_BTD), dim=1)
    if keep_BT is not None:
        # Place 0 is what came before this call; a token at t lies at t + 1.
        place = torch.arange(1, T + 1, device=x_BTD.device) * keep_BT.long()
        newest = torch.cat((place.new_zeros(B, 1), place), dim=1).cummax(dim=1).values
        with_before = with_before.gather(1, newest.unsqueeze(-1).expand(-1, -1, D))
    previous, last = with_before[:, :-1], with_before[:, -1]
    if cu_seqlens is not None:
        starts = torch.zeros(B * T + 1, dtype=torch.bool, device=x_BTD.device)
        starts[cu_seqlens.long()] = True
        starts = starts[:-1].view(B, T, 1)
        if row_part is not None:
            starts[:, 0] = False
        previous = previous.masked_fill(starts, 0.0)
    return previous, last
