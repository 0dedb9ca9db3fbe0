"""Device functions that the Triton kernels of wkv7 share: the gates of a chunk, and the inverse of its triangle."""

# ruff: noqa: RET505 -- of two compile-time branches only the taken one may exist
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def gates(w, C: tl.constexpr, BEFORE: tl.constexpr, CUMULATE_BY_DOT: tl.constexpr):
    """In log2: inclusive and exclusive cumulative decay [C,K], its value after BEFORE rows and after all [K].

    A bf16 decay times the ones of a triangle is exact, so the tensor cores may sum it; others are scanned in fp32.
    """
    i = tl.arange(0, C)
    own = w.to(tl.float32) * LOG2E
    if CUMULATE_BY_DOT:
        g = tl.dot((i[:, None] >= i[None, :]).to(tl.bfloat16), w) * LOG2E
    else:
        g = tl.cumsum(own, 0)
    middle = tl.sum(tl.where((i < BEFORE)[:, None], own, 0.0), 0)
    return g, g - own, middle, tl.sum(own, 0)


@triton.jit
def centred_gates(w, C: tl.constexpr, CUMULATE_BY_DOT: tl.constexpr):
    """In log2: inclusive and exclusive cumulative decay [C,K], counted from after half of the rows."""
    i = tl.arange(0, C)
    before = (i < C // 2)[None, :].to(tl.int32)
    if CUMULATE_BY_DOT:
        g = tl.dot(((i[:, None] >= i[None, :]).to(tl.int32) - before).to(tl.bfloat16), w)
        ge = tl.dot(((i[:, None] > i[None, :]).to(tl.int32) - before).to(tl.bfloat16), w)
        return g * LOG2E, ge * LOG2E
    else:
        g, ge, middle, _ = gates(w, C, C // 2, False)
        return g - middle[None, :], ge - middle[None, :]


@triton.jit
def unit_lower_inverse(blocks, A, C: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr):
    """(I - A)⁻¹ for strictly lower A [C,C] with `blocks` [C/16,16,16] on its diagonal; LEVELS = log2 C.

    T <- T + T (A on the odd blocks of size s, left of the diagonal) T for s = 1, 2, ..., C/2: substitution by blocks,
    every intermediate an entry of a true inverse. The first four levels work on all diagonal blocks at once.
    """
    NB: tl.constexpr = C // 16
    j = tl.arange(0, 16)
    T = (j[:, None] == j[None, :]).to(tl.float32)[None, :, :] + tl.zeros([NB, 16, 16], tl.float32)
    for level in tl.static_range(4):
        row = j[:, None] // (1 << level)
        column = j[None, :] // (1 << level)
        mask = (row == column + 1) & (row % 2 == 1)
        X = tl.dot(T.to(DT), tl.where(mask[None, :, :], blocks, 0.0).to(DT), input_precision=IP)
        T += tl.dot(X.to(DT), T.to(DT), input_precision=IP)
    n = tl.arange(0, NB)
    diagonal = (n[:, None] == n[None, :])[:, None, :, None]
    spread = tl.where(diagonal, tl.broadcast_to(T[:, :, None, :], [NB, 16, NB, 16]), 0.0)
    inverse = tl.reshape(spread, [C, C])
    i = tl.arange(0, C)
    for level in tl.static_range(4, LEVELS):
        row = i[:, None] // (1 << level)
        column = i[None, :] // (1 << level)
        mask = (row == column + 1) & (row % 2 == 1)
        X = tl.dot(inverse.to(DT), tl.where(mask, A, 0.0).to(DT), input_precision=IP)
        inverse += tl.dot(X.to(DT), inverse.to(DT), input_precision=IP)
    return inverse
