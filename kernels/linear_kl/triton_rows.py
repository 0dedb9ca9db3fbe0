"""Losses and gradients of rows of logits in one Triton kernel: every logit is read once, every gradient written once.

A row of 152,064 logits of two models is 1.2 MB: too much for one program's registers, so PARTS programs share a row.
Each keeps its part in registers, publishes its maxima and sums, waits for the others' and then writes its gradients.
Programs take their place from a counter, in the order in which they start, so that whoever is waited for has started or
is next to start: the wait ends as long as PARTS programs fit on the GPU together.

Dims: n rows (tokens), V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from radlads.kernels.linear_kl.rows import RowLosses, RowSettings

MAX_PART = 4096  # logits of one model that a program keeps in registers
_WARPS = 8
_REGISTERS = 80  # a thread: three programs on an NVIDIA multiprocessor, so that one's waiting is another's loading
_FACTS = tl.constexpr(9)  # numbers that a program publishes about its part of a row


@triton.jit
def rows_kernel(
    z, y, labels, factors, grad, kl, nll, smooth, same, facts, arrived, ticket,
    V, stride_z, stride_y, stride_grad, cold_s, cold_t, kl_factor, smoothing, l2wrap, ignore_index,
    PARTS: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr,
    FACTORS: tl.constexpr, GRAD: tl.constexpr, TEMPERED: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """One part of one row. `cold_s` and `cold_t` are 1 / temperature; TEMPERED if the student's is not 1."""
    if PARTS > 1:
        place = tl.atomic_add(ticket, 1)
    else:
        place = tl.program_id(0)
    row = (place // PARTS).to(tl.int64)
    part = place % PARTS
    x = part * BLOCK + tl.arange(0, BLOCK)
    inside = x < V
    infinity = float("inf")
    zx = tl.load(z + row * stride_z + x, mask=inside, other=-infinity).to(tl.float32)
    top = tl.max(zx, 0)
    top_at = tl.min(tl.where(zx == top, x, V), 0)
    total = tl.sum(tl.exp((zx - top) * cold_s), 0)
    total_ce = total
    if LABELS and TEMPERED:
        total_ce = tl.sum(tl.exp(zx - top), 0)
    plain = 0.0
    if SMOOTH:
        plain = tl.sum(tl.where(inside, zx, 0.0), 0)
    label = tl.full([], -1, tl.int64)
    of_label = 0.0
    counted = label == label
    if LABELS:
        label = tl.load(labels + row)
        counted = label != ignore_index
        known = counted & (label >= 0) & (label < V)
        of_label = tl.load(z + row * stride_z + tl.where(known, label, 0)).to(tl.float32)
        of_label = tl.where(known | (label == ignore_index), of_label, float("nan"))
    if TEACHER:
        yx = tl.load(y + row * stride_y + x, mask=inside, other=-infinity).to(tl.float32)
        top_y = tl.max(yx, 0)
        top_y_at = tl.min(tl.where(yx == top_y, x, V), 0)
        p = tl.exp((yx - top_y) * cold_t)
        total_y = tl.sum(p, 0)
        cross = tl.sum(tl.where(inside, p * (yx * cold_t - zx * cold_s), 0.0), 0)

    if PARTS > 1:
        mine = facts + (row * PARTS + part) * _FACTS
        tl.store(mine, top)
        tl.store(mine + 1, total)
        tl.store(mine + 2, total_ce)
        tl.store(mine + 3, top_at.to(tl.float32))  # exact below 2^24
        tl.store(mine + 4, plain)
        if TEACHER:
            tl.store(mine + 5, top_y)
            tl.store(mine + 6, total_y)
            tl.store(mine + 7, cross)
            tl.store(mine + 8, top_y_at.to(tl.float32))
        tl.debug_barrier()
        tl.atomic_add(arrived + row, 1, sem="acq_rel")
        while tl.atomic_add(arrived + row, 0, sem="acq_rel") < PARTS:
            pass
        tl.debug_barrier()
        i = tl.arange(0, POWER)
        theirs = facts + (row * PARTS + i) * _FACTS
        real = i < PARTS
        tops = tl.load(theirs, mask=real, other=-infinity, cache_modifier=".cg")
        top = tl.max(tops, 0)
        shrink = tl.exp((tops - top) * cold_s)
        total = tl.sum(tl.load(theirs + 1, mask=real, other=0.0, cache_modifier=".cg") * shrink, 0)
        total_ce = tl.sum(
            tl.load(theirs + 2, mask=real, other=0.0, cache_modifier=".cg") * tl.exp(tops - top), 0
        )  # with TEMPERED off, the same as total
        places = tl.load(theirs + 3, mask=real, other=0.0, cache_modifier=".cg")
        top_at = tl.min(tl.where(tops == top, places, infinity), 0).to(tl.int32)
        plain = tl.sum(tl.load(theirs + 4, mask=real, other=0.0, cache_modifier=".cg"), 0)
        if TEACHER:
            tops = tl.load(theirs + 5, mask=real, other=-infinity, cache_modifier=".cg")
            own = top_y
            top_y = tl.max(tops, 0)
            shrink = tl.exp((tops - top_y) * cold_t)
            p *= tl.exp((own - top_y) * cold_t)
            total_y = tl.sum(tl.load(theirs + 6, mask=real, other=0.0, cache_modifier=".cg") * shrink, 0)
            cross = tl.sum(tl.load(theirs + 7, mask=real, other=0.0, cache_modifier=".cg") * shrink, 0)
            places = tl.load(theirs + 8, mask=real, other=0.0, cache_modifier=".cg")
            top_y_at = tl.min(tl.where(tops == top_y, places, infinity), 0).to(tl.int32)

    if part == 0:
        if LABELS:
            level = top + tl.log(total_ce)
            tl.store(nll + row, tl.where(counted, level - of_label, 0.0))
            if SMOOTH:
                tl.store(smooth + row, tl.where(counted, level - plain / V, 0.0))
        if TEACHER:
            shift = (top_y * cold_t + tl.log(total_y)) - (top * cold_s + tl.log(total))
            tl.store(kl + row, cross / total_y - shift)
            tl.store(same + row, (top_at == top_y_at).to(tl.float32))
        elif LABELS:
            tl.store(same + row, (counted & (top_at == label)).to(tl.float32))
    if GRAD:
        tl.debug_barrier()  # the gradient may overwrite the logits, and every thread reads the label's
        q = tl.exp((zx - top) * cold_s) / total
        pull = tl.zeros([BLOCK], tl.float32)
        if TEACHER:
            pull = kl_factor * (q - p / total_y)
        if FACTORS:
            factor = tl.load(factors + row)
            if TEMPERED:
                q = tl.exp(zx - top) / total_ce
            pull += factor * (q - smoothing / V - tl.where(x == label, 1.0 - smoothing, 0.0))
        pull += tl.where(x == top_at, l2wrap * top, 0.0)
        tl.store(grad + row * stride_grad + x, pull.to(grad.dtype.element_ty), mask=inside)


def triton_rows(
    z_nV: Tensor,
    y_nV: Tensor | None,
    labels_n: Tensor | None,
    ce_factor_n: Tensor | None,
    grad_nV: Tensor | None,
    settings: RowSettings,
    losses: RowLosses,
) -> None:
    """As `torch_rows`, for logits and sums that are not fp64. A label outside the vocabulary makes its loss NaN."""
    n, V = z_nV.shape
    labels_n, ce_factor_n = (None if x is None else x.contiguous() for x in (labels_n, ce_factor_n))
    block = min(MAX_PART, triton.next_power_of_2(V))
    parts = triton.cdiv(V, block)
    nvidia = z_nV.is_cuda and torch.version.hip is None
    options = {"num_warps": _WARPS, "maxnreg": _REGISTERS} if nvidia else {"num_warps": _WARPS}
    facts = arrived = ticket = None
    if parts > 1:
        facts = torch.empty(n * parts * _FACTS.value, dtype=torch.float32, device=z_nV.device)
        arrived = torch.zeros(n + 1, dtype=torch.int32, device=z_nV.device)
        arrived, ticket = arrived[:n], arrived[n:]
    with torch.cuda.device(z_nV.device) if z_nV.is_cuda else nullcontext():
        rows_kernel[(n * parts,)](
            z_nV, y_nV, labels_n, ce_factor_n, grad_nV, *losses, facts, arrived, ticket,
            V, z_nV.stride(0), 0 if y_nV is None else y_nV.stride(0), 0 if grad_nV is None else grad_nV.stride(0),
            1 / settings.student_temperature, 1 / settings.teacher_temperature, settings.kl_factor,
            settings.smoothing, settings.l2wrap, settings.ignore_index,
            PARTS=parts, POWER=triton.next_power_of_2(parts), BLOCK=block, TEACHER=y_nV is not None,
            LABELS=labels_n is not None, FACTORS=ce_factor_n is not None, GRAD=grad_nV is not None,
            TEMPERED=settings.student_temperature != 1, SMOOTH=settings.smoothing != 0, **options,
        )  # fmt: skip
