"""Device functions that the Triton kernels of every recurrence share: masked tiles, and where a chunk lies.

A chunk slot is one chunk of one sequence. Dense: slot = sequence * num_chunks + chunk. Packed: sequences own the slots
`offsets[n] .. offsets[n + 1]`, found on the device by bisection, so that nothing waits for the host.
"""

# ruff: noqa: RET505 -- of two compile-time branches only the taken one may exist
from __future__ import annotations

import triton
import triton.language as tl

# Sizes that differ from call to call: one compiled kernel is used for all of them.
LENGTHS = ("num_sequences", "T", "num_chunks", "H")


@triton.jit
def load_tile(pointer, offsets, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        return tl.load(pointer + offsets)


@triton.jit
def store_tile(pointer, offsets, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty))


@triton.jit
def find_sequence(slot, offsets, num_sequences):
    """The last n with offsets[n] <= slot: empty sequences own no slot and are skipped."""
    low = slot * 0
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets + middle).to(tl.int64) <= slot:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def locate(slot, cu_seqlens, offsets, num_sequences, T, num_chunks, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of the slot (in the flattened batch) and its number of tokens."""
    if PACKED:
        n = find_sequence(slot, offsets, num_sequences)
        first = tl.load(cu_seqlens + n).to(tl.int64) + (slot - tl.load(offsets + n).to(tl.int64)) * C
        return first, tl.minimum(tl.load(cu_seqlens + n + 1).to(tl.int64) - first, C)
    else:
        n = slot // num_chunks
        chunk = slot - n * num_chunks
        return n * T + chunk * C, tl.minimum(T - chunk * C, C)


@triton.jit
def locate_sequence(n, cu_seqlens, offsets, T, num_chunks, PACKED: tl.constexpr):
    """First token, number of tokens, first slot and number of slots of sequence n."""
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        slot = tl.load(offsets + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - first
        return first, length, slot, (tl.load(offsets + n + 1).to(tl.int64) - slot).to(tl.int32)
    else:
        return n * T, n * 0 + T, n * num_chunks, (n * 0 + num_chunks).to(tl.int32)
