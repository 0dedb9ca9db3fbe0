"""Sequence parallelism: the ranks of a group share rows, and each holds as many consecutive tokens of every row.

Dims: B rows, T tokens of a row, L = T/P tokens of a rank's part, P ranks of a group, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from radlads.kernels.shared.split import Operator, run_part
from radlads.model.sequence_parallel.exchange import AllToAll, EnteringState, FromRankBefore
from radlads.model.student.documents import document_bounds, document_positions


@dataclass(frozen=True, eq=False)
class RowPart:
    """This rank's part of the rows of one forward pass. Made by `row_part`; the layers of the pass share it."""

    group: distributed.ProcessGroup
    position_ids: Tensor
    """[1 or B, L], those of the whole row."""
    cu_seqlens: Tensor | None = None
    """int64, document bounds in the flattened [B·L] of this part, row bounds included."""
    continues: Tensor | None = None
    """Bool [B]: whether a row's part goes on with a document of the rank before; None: each does."""
    whole_bounds: Tensor | None = None
    """int64, document bounds in the flattened [B·T] of whole rows."""

    def before(self, last_BD: Tensor) -> Tensor:
        """The last input of the rank before, for each row; zeros where a row, or a document, begins here."""
        before = FromRankBefore.apply(self.group, last_BD)
        return before if self.continues is None else before * self.continues[:, None].to(before.dtype)

    def run(self, operator: Operator, inputs: tuple[Tensor, ...]) -> Tensor:
        """The outputs [B,L,H,V] of a recurrence over whole rows; inputs are this part's, in the operator's order."""
        part = run_part(operator, inputs, cu_seqlens=self.cu_seqlens, continues_B=self.continues)
        return part.outputs(EnteringState.apply(self.group, part.A, part.B))

    def run_by_heads(
        self, operator: Callable[..., tuple[Tensor, Any]], inputs: tuple[Tensor, ...], **options: Any
    ) -> Tensor:
        """The outputs [B,L,H,V] of an operator over whole rows, each rank with H/P heads of them (DeepSpeed-Ulysses,
        arXiv 2309.14509). inputs [B,L,H,·]; options: the operator's."""
        ranks, widths = self.group.size(), [x.shape[-1] for x in inputs]
        sent = torch.cat(inputs, -1).unflatten(2, (ranks, -1)).movedim(2, 0)  # [P,B,L,H/P,·]
        whole = AllToAll.apply(self.group, sent).movedim(0, 1).flatten(1, 2)  # [B,T,H/P,·]
        rows = whole.split(widths, -1)
        if self.whole_bounds is None:
            out = operator(*rows, **options)[0]
        else:
            flat = (x.reshape(1, -1, *x.shape[2:]) for x in rows)
            out = operator(*flat, cu_seqlens=self.whole_bounds, **options)[0].view(*whole.shape[:3], -1)
        received = AllToAll.apply(self.group, out.unflatten(1, (ranks, -1)).movedim(1, 0))
        return received.movedim(0, 2).flatten(2, 3)

    @cached_property
    def documents(self) -> list[tuple[int, int]] | None:
        """(start, stop) of every document in the flattened [B·T] of whole rows, on the host; None: rows are whole
        documents."""
        return None if self.whole_bounds is None else list(pairwise(self.whole_bounds.tolist()))


def row_part(
    group: distributed.ProcessGroup, length: int, device: torch.device, document_ids_BT: Tensor | None = None
) -> RowPart:
    """The part of this rank, `length` tokens of each row. document_ids: of whole rows, where documents are separate."""
    start = group.rank() * length
    here = slice(start, start + length)
    if document_ids_BT is None:
        return RowPart(group, torch.arange(here.start, here.stop, device=device)[None])
    bounds = document_bounds(document_ids_BT)
    if start == 0:
        continues = torch.zeros(len(document_ids_BT), dtype=torch.bool, device=device)
    else:
        continues = document_ids_BT[:, start - 1] == document_ids_BT[:, start]
    return RowPart(
        group,
        document_positions(bounds, *document_ids_BT.shape)[:, here],
        cu_seqlens=document_bounds(document_ids_BT[:, here]),
        continues=continues,
        whole_bounds=bounds,
    )
