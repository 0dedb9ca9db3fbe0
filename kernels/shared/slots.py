"""Common parts of the operators in plain torch: positions and lengths of the chunks of dense and packed sequences.

Dims: B batch, T time, H heads, D, K, V dims of a head, N packed sequences, C chunk, G tiles (chunk slots x heads).

Needs torch only and imports nothing else, so that an exported model can carry this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor


class DenseSlots:
    """Chunk slots of B sequences of one length: step t of all of them, then step t + 1. Tails are filled with zeros."""

    def __init__(self, B: int, T: int, H: int, C: int) -> None:
        self.B, self.T, self.H, self.C = B, T, H, C
        self.num_steps = -(-T // C)
        self.counts = [B * H] * self.num_steps  # tiles in each step of the scan
        self.starts = [B * H * step for step in range(self.num_steps)]

    def pack(self, x_BTHD: Tensor, dtype: torch.dtype) -> Tensor:
        """[B,T,H,D] -> [G,C,D] in `dtype`, always a copy: callers work in place."""
        padding = self.num_steps * self.C - self.T
        x = torch.nn.functional.pad(x_BTHD, (0, 0, 0, 0, 0, padding)) if padding else x_BTHD
        x = x.reshape(self.B, self.num_steps, self.C, self.H, -1).permute(1, 0, 3, 2, 4)
        packed = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
        return packed.reshape(-1, self.C, x.shape[-1])

    def unpack(self, y_GCD: Tensor, dtype: torch.dtype) -> Tensor:
        y = y_GCD.reshape(self.num_steps, self.B, self.H, self.C, -1).permute(1, 0, 3, 2, 4)
        return y.reshape(self.B, self.num_steps * self.C, self.H, -1)[:, : self.T].to(dtype)

    def pack_state(self, state_BHKV: Tensor, dtype: torch.dtype) -> Tensor:
        return state_BHKV.to(dtype).flatten(0, 1)

    def unpack_state(self, state: Tensor) -> Tensor:
        return state.unflatten(0, (self.B, self.H))


class PackedSlots:
    """Chunk slots of N sequences packed in one row, longest first, so that every step of the scan is a prefix."""

    def __init__(self, cu_seqlens: Tensor, H: int, C: int) -> None:
        bounds = cu_seqlens.detach().cpu().long()
        start, length = bounds[:-1], bounds[1:] - bounds[:-1]
        steps = (length + C - 1) // C
        order = torch.argsort(steps, descending=True, stable=True)
        num_steps = int(steps.max()) if steps.numel() else 0
        counts = [int((steps > step).sum()) for step in range(num_steps)]
        sequence = torch.cat([order[:count] for count in counts]) if counts else order[:0]
        host = partial(torch.arange, device="cpu")  # independent of torch's default device
        step = host(num_steps).repeat_interleave(torch.tensor(counts, dtype=torch.long, device="cpu"))
        position = step[:, None] * C + host(C)
        live = position < length[sequence][:, None]
        token = (start[sequence][:, None] + position).where(live, 0).flatten()
        live = live.flatten()
        place = torch.empty(int(bounds[-1]), dtype=torch.long, device="cpu")
        place[token[live]] = host(token.numel())[live]
        device = cu_seqlens.device
        self.H, self.C, self.num_steps = H, C, num_steps
        self.counts = [count * H for count in counts]
        self.starts = [sum(self.counts[:step]) for step in range(num_steps)]
        self.token, self.place = token.to(device), place.to(device)
        self.filler = ~live.to(device)[:, None, None]
        self.order = order.to(device)
        self.rank = torch.argsort(order).to(device)

    def pack(self, x_1THD: Tensor, dtype: torch.dtype) -> Tensor:
        x = x_1THD[0].index_select(0, self.token).to(dtype).masked_fill_(self.filler, 0)
        return x.reshape(-1, self.C, self.H, x.shape[-1]).transpose(1, 2).reshape(-1, self.C, x.shape[-1])

    def unpack(self, y_GCD: Tensor, dtype: torch.dtype) -> Tensor:
        y = y_GCD.reshape(-1, self.H, self.C, y_GCD.shape[-1]).transpose(1, 2).flatten(0, 1)
        return y.index_select(0, self.place).to(dtype)[None]

    def pack_state(self, state_NHKV: Tensor, dtype: torch.dtype) -> Tensor:
        return state_NHKV.index_select(0, self.order).to(dtype).flatten(0, 1)

    def unpack_state(self, state: Tensor) -> Tensor:
        return state.unflatten(0, (-1, self.H)).index_select(0, self.rank)


Slots = DenseSlots | PackedSlots


def chunk_slots(B: int, T: int, H: int, C: int, cu_seqlens: Tensor | None) -> Slots:
    """The slots of B sequences of T tokens, or of the sequences between `cu_seqlens` [N+1] in one row (a host sync)."""
    return DenseSlots(B, T, H, C) if cu_seqlens is None else PackedSlots(cu_seqlens, H, C)


def longest_chunk(most: int, T: int, fits: Callable[[int], bool]) -> int:
    """The smallest power of two from which on a chunk need not (`most`, T) or must not (`fits` of it) grow further."""
    chunk = 1
    while chunk < min(most, T) and fits(chunk):
        chunk *= 2
    return chunk


def sum_type(v: Tensor) -> torch.dtype:
    """The compute dtype: fp32; fp64 for fp64 inputs."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def zero_states(k_BTHK: Tensor, v_BTHV: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state before every sequence, [B or N,H,K,V], if the caller gave none."""
    B, _, H, K = k_BTHK.shape
    count = B if cu_seqlens is None else cu_seqlens.numel() - 1
    return torch.zeros(count, H, K, v_BTHV.shape[-1], dtype=sum_type(v_BTHV), device=v_BTHV.device)


def scan_chunks(
    slots: Slots, new_GKV: Tensor, state: Tensor, move: Callable[[slice, Tensor, Tensor], object], *, backwards: bool
) -> tuple[Tensor, Tensor]:
    """Carry a state over the chunks: (the state before each of them [G,K,V], the last one of every sequence).

    move: (tiles of this step, state before, where to write the state after) for one step of the scan, which visits the
    chunks from the last to the first where `backwards`.
    """
    states, state = torch.empty_like(new_GKV), state.clone()
    for here, count in _steps(slots, backwards):
        states[here] = state[:count]
        move(here, states[here], state[:count])
    return states, state


def _steps(slots: Slots, backwards: bool) -> Iterator[tuple[slice, int]]:
    spans = list(zip(slots.starts, slots.counts, strict=True))
    for start, count in reversed(spans) if backwards else spans:
        yield slice(start, start + count), count
