"""The trained state as slices of flattened parameters, whoever holds them: every ZeRO stage, offloaded or not.

A rank's part of the state is a list of slices, each a run of elements of one parameter with its fp32 master, its two
moments and, where one is kept, its average. Adam works elementwise, so any other division of the same elements over
ranks is the same state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("param", *MOMENTS)
"""Of each element: the fp32 master and the two moments of Adam."""
ELEMENT_BYTES = 4 * len(KINDS)
AVERAGE = "average"
"""The kind that a stage with `average` has besides, fp32."""


@dataclass(frozen=True)
class StateSlice:
    """Elements start ... start + numel of a flattened parameter. tensors: kind → [numel], views of the live state."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]

    @property
    def kinds(self) -> tuple[str, ...]:
        """KINDS, and what there is besides, in one order."""
        return tuple(self.tensors)

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        return self.tensors["param"].numel()

    def narrow(self, first: int, count: int) -> StateSlice:
        """`count` elements from the slice's own element `first` on; views as well."""
        parts = {kind: tensor.narrow(0, first, count) for kind, tensor in self.tensors.items()}
        return StateSlice(self.name, self.start + first, parts)


def whole_slices(parameters: Mapping[str, nn.Parameter], adam: torch.optim.Optimizer) -> list[StateSlice]:
    """Without ZeRO, where every rank holds everything and the parameters are their own masters."""
    return [
        StateSlice(
            name,
            0,
            {"param": parameter.detach().view(-1)} | {kind: adam.state[parameter][kind].view(-1) for kind in MOMENTS},
        )
        for name, parameter in parameters.items()
    ]


def partition_slices(parameters: Mapping[str, nn.Parameter]) -> list[StateSlice]:
    """Under ZeRO-1 and 2: what of each parameter lies in this rank's partition, by DeepSpeed's own mapping."""
    named: Iterable[tuple[str, Any]] = parameters.items()
    mapped = [(name, parameter._hp_mapping) for name, parameter in named]
    return [
        StateSlice(
            name,
            fragment.lp_fragment_address.start,
            {"param": fragment.get_hp_fragment().detach()}
            | {kind: fragment.get_optim_state_fragment(kind) for kind in MOMENTS},
        )
        for name, fragment in mapped
        if fragment is not None
    ]


def equal_share(slices: Iterable[StateSlice], rank: int, ranks: int) -> list[StateSlice]:
    """The rank's share of slices that all ranks hold: as many elements as any other's, give or take one."""
    everything = list(slices)
    total = sum(one.numel for one in everything)
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    share, place = [], 0
    for one in everything:
        begin, end = max(first - place, 0), min(last - place, one.numel)
        if begin < end:
            share.append(one.narrow(begin, end - begin))
        place += one.numel
    return share


def kinds_of(slices: Sequence[StateSlice]) -> tuple[str, ...]:
    """The kinds of a rank's part of the state."""
    return slices[0].kinds if slices else KINDS


def into_files(slices: Sequence[StateSlice], file_elements: int) -> list[list[StateSlice]]:
    """Divide slices over files of at most `file_elements` elements each; at least one file, which may be empty."""
    files: list[list[StateSlice]] = [[]]
    room = file_elements
    for one in slices:
        first = 0
        while first < one.numel:
            if room == 0:
                files.append([])
                room = file_elements
            count = min(room, one.numel - first)
            files[-1].append(one.narrow(first, count))
            first, room = first + count, room - count
    return files
