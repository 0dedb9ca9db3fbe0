"""Losses and gradients of rows of logits in one Triton kernel: one read from memory, a second one from the L2 cache.

A row has PARTS parts; a task is one part of one row. The grid has P programs, as many as fit on the GPU at once;
program p runs tasks p, p + P, p + 2P ... For each task it publishes maxima and sums of the part. The last program of a
row combines them into the row's losses and the few values that its gradient needs. LAG tasks later, the program reads
the part again and writes its gradient. Nothing stays in registers between the two passes, so many programs fit on a
multiprocessor, and their loads, arithmetic and waits overlap.

There is no deadlock: all P programs run at once (a cooperative launch fails if they do not fit), and LAG P >= PARTS, so
the second pass of round k waits only for first passes of rounds up to k, and in each round the first pass comes before
the second.

The gradient may overwrite the logits: a program overwrites a part only after its own second read and after the row was
combined, and only the combination reads logits of other parts (the label's).

Dims: n rows (tokens), V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from radlads.kernels.linear_kl.rows import RowLosses, RowSettings

# The L2 cache holds at most 2 LAG P blocks of both models' logits between the passes: on an H100 with fp32 logits,
# 2 · 132 · 6 · 2048 · 8 bytes = 26 MB of 50.
_BLOCK = 2048  # logits of one model per part
_WARPS = 4
_PROGRAMS = 6  # per multiprocessor, if they fit
_REGISTERS = 80  # maximum per thread, so that six programs of four warps fit on an NVIDIA multiprocessor
_LAG = 1  # rounds between the two passes of a part; more if a row has more parts than there are programs
FACTS = tl.constexpr(10)  # values per part of a row
RESULTS = tl.constexpr(7)  # values per row
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _two_largest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _two_smallest(a, b, c, d):
    return tl.minimum(a, c), tl.minimum(b, d)


@triton.jit
def _three_sums(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _four_sums(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _top_place(facts, PARTS: tl.constexpr, POWER: tl.constexpr):
    """Position of the first of a model's largest logits."""
    infinity = float("inf")
    i = tl.arange(0, POWER)
    tops = tl.load(facts + i, mask=i < PARTS, other=-infinity, cache_modifier=".cg")
    places = tl.load(facts + 3 * PARTS + i, mask=i < PARTS, other=infinity, cache_modifier=".cg")
    return tl.min(tl.where(tops == tl.max(tops, 0), places, infinity), 0)


@triton.jit
def combine(
    row, of_label, top_at, top_y_at, labels, kl, nll, smooth, same, trained, facts, results, V, cold_s, cold_t,
    ignore_index,
    PARTS: tl.constexpr, POWER: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr, TEMPERED: tl.constexpr,
    SMOOTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Compute losses and results of a row from the facts of its parts, the label's logit (any value without a label)
    and the positions of both models' largest logits."""
    infinity = float("inf")
    if LABELS:
        label = tl.load(labels + row)
        counted = label != ignore_index
        of_label = tl.where(counted & ((label < 0) | (label >= V)), float("nan"), of_label)
    i = tl.arange(0, POWER)
    theirs = facts + row * (FACTS * PARTS) + i
    real = i < PARTS
    tops = tl.load(theirs, mask=real, other=-infinity, cache_modifier=".cg")
    totals = tl.load(theirs + PARTS, mask=real, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp2((tops - top) * (cold_s * LOG2E)), 0)
    total_ce = total
    if LABELS and TEMPERED:
        totals = tl.load(theirs + 2 * PARTS, mask=real, other=0.0, cache_modifier=".cg")
        total_ce = tl.sum(totals * tl.exp2((tops - top) * LOG2E), 0)
    out = results + row * RESULTS
    tl.store(out, top)
    tl.store(out + 1, tl.log2(total))
    tl.store(out + 2, tl.log2(total_ce))
    tl.store(out + 3, top_at)
    if LABELS:
        level = top + tl.log(total_ce)
        tl.store(nll + row, tl.where(counted, level - of_label, 0.0))
        if SMOOTH:
            plain = tl.sum(tl.load(theirs + 4 * PARTS, mask=real, other=0.0, cache_modifier=".cg"), 0)
            tl.store(smooth + row, tl.where(counted, level - plain / V, 0.0))
        if not TEACHER:
            tl.store(same + row, (counted & (top_at.to(tl.int32) == label)).to(tl.float32))
    if REVERSE:
        backs = tl.load(theirs + 9 * PARTS, mask=real, other=0.0, cache_modifier=".cg")
        back = tl.sum(backs * tl.exp2((tops - top) * (cold_s * LOG2E)), 0) / total
        tl.store(out + 6, back)
    if TEACHER:
        tops = tl.load(theirs + 5 * PARTS, mask=real, other=-infinity, cache_modifier=".cg")
        totals = tl.load(theirs + 6 * PARTS, mask=real, other=0.0, cache_modifier=".cg")
        crosses = tl.load(theirs + 7 * PARTS, mask=real, other=0.0, cache_modifier=".cg")
        top_y = tl.max(tops, 0)
        shrink = tl.exp2((tops - top_y) * (cold_t * LOG2E))
        total_y = tl.sum(totals * shrink, 0)
        cross = tl.sum(crosses * shrink, 0)
        tl.store(out + 4, top_y)
        tl.store(out + 5, tl.log2(total_y))
        shift = (top_y * cold_t + tl.log(total_y)) - (top * cold_s + tl.log(total))
        tl.store(kl + row, cross / total_y - shift)
        if REVERSE:
            tl.store(trained + row, back + shift)
        tl.store(same + row, (top_at == top_y_at).to(tl.float32))


@triton.jit
def pull_of(
    difference, q_ce, x, row, labels, factors, results, V, kl_factor, smoothing, l2wrap,
    TEACHER: tl.constexpr, FACTORS: tl.constexpr, SMOOTH: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits `x` of a row, from that of the divergence (g of `RowSettings`) and the student's
    distribution at temperature 1."""
    pull = tl.zeros_like(x).to(tl.float32)
    if TEACHER:
        pull = kl_factor * difference
    if FACTORS:
        label = tl.load(labels + row)
        label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
        if SMOOTH:
            q_ce -= smoothing / V
        pull += tl.load(factors + row) * (q_ce - tl.where(x == label, 1.0 - smoothing, 0.0))
    if WRAP:
        top_at = tl.load(results + row * RESULTS + 3, cache_modifier=".cg").to(tl.int32)
        top = tl.load(results + row * RESULTS, cache_modifier=".cg")
        pull += tl.where(x == top_at, l2wrap * top, 0.0)
    return pull


@triton.jit
def _publish(
    task, z, y, labels, kl, nll, smooth, same, trained, facts, results, arrived,
    V, stride_z, stride_y, cold_s, cold_t, ignore_index,
    PARTS: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """First pass of a task: publish the facts of the part. The last program of a row combines them."""
    row = (task // PARTS).to(tl.int64)
    part = task % PARTS
    x = part * BLOCK + tl.arange(0, BLOCK)
    inside = x < V
    infinity = float("inf")
    mine = facts + row * (FACTS * PARTS) + part  # one fact of all parts is contiguous
    zx = tl.load(z + row * stride_z + x, mask=inside, other=-infinity).to(tl.float32)
    if TEACHER:  # reduce both models together: half of the barriers
        yx = tl.load(y + row * stride_y + x, mask=inside, other=-infinity).to(tl.float32)
        top, top_y = tl.reduce((zx, yx), 0, _two_largest)
        at, at_y = tl.reduce((tl.where(zx == top, x, V), tl.where(yx == top_y, x, V)), 0, _two_smallest)
        q = tl.exp2((zx - top) * (cold_s * LOG2E))
        p = tl.exp2((yx - top_y) * (cold_t * LOG2E))
        cross = tl.where(inside, p * (yx * cold_t - zx * cold_s), 0.0)
        if REVERSE:
            back = tl.where(inside, q * (zx * cold_s - yx * cold_t), 0.0)
            total, total_y, cross, back = tl.reduce((q, p, cross, back), 0, _four_sums)
            tl.store(mine + 9 * PARTS, back)
        else:
            total, total_y, cross = tl.reduce((q, p, cross), 0, _three_sums)
        tl.store(mine + 5 * PARTS, top_y)
        tl.store(mine + 6 * PARTS, total_y)
        tl.store(mine + 7 * PARTS, cross)
        tl.store(mine + 8 * PARTS, at_y.to(tl.float32))
    else:
        top = tl.max(zx, 0)
        at = tl.min(tl.where(zx == top, x, V), 0)
        total = tl.sum(tl.exp2((zx - top) * (cold_s * LOG2E)), 0)
    tl.store(mine, top)
    tl.store(mine + PARTS, total)
    tl.store(mine + 3 * PARTS, at.to(tl.float32))  # exact below 2^24
    if LABELS and TEMPERED:
        tl.store(mine + 2 * PARTS, tl.sum(tl.exp2((zx - top) * LOG2E), 0))
    if SMOOTH:
        tl.store(mine + 4 * PARTS, tl.sum(tl.where(inside, zx, 0.0), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == PARTS - 1:
        tl.debug_barrier()
        of_label = 0.0
        if LABELS:
            label = tl.load(labels + row)
            of_label = tl.load(z + row * stride_z + tl.where((label >= 0) & (label < V), label, 0)).to(tl.float32)
        top_at = _top_place(mine - part, PARTS, POWER)
        top_y_at = top_at
        if TEACHER:
            top_y_at = _top_place(mine - part + 5 * PARTS, PARTS, POWER)
        combine(
            row, of_label, top_at, top_y_at, labels, kl, nll, smooth, same, trained, facts, results, V, cold_s, cold_t,
            ignore_index, PARTS, POWER, TEACHER, LABELS, TEMPERED, SMOOTH, REVERSE,
        )  # fmt: skip
        tl.debug_barrier()  # all threads have read the label's logit, which the gradient may overwrite
        tl.atomic_add(arrived + row, 1, sem="release")


@triton.jit
def _write_gradient(
    task, z, y, labels, factors, grad, results, arrived,
    V, stride_z, stride_y, stride_grad, cold_s, cold_t, kl_factor, smoothing, l2wrap,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, TEACHER: tl.constexpr, FACTORS: tl.constexpr, TEMPERED: tl.constexpr,
    SMOOTH: tl.constexpr, WRAP: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Second pass of a task: write the gradient of the part."""
    row = (task // PARTS).to(tl.int64)
    part = task % PARTS
    x = part * BLOCK + tl.arange(0, BLOCK)
    inside = x < V
    zx = tl.load(z + row * stride_z + x, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if TEACHER:
        yx = tl.load(y + row * stride_y + x, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    while tl.atomic_add(arrived + row, 0, sem="acquire") <= PARTS:
        pass
    tl.debug_barrier()  # all threads have read their logits, which the gradient may overwrite
    out = results + row * RESULTS
    top = tl.load(out, cache_modifier=".cg")
    q = tl.zeros([BLOCK], tl.float32)
    difference = q
    if TEACHER or not TEMPERED:
        q = tl.exp2((zx - top) * (cold_s * LOG2E) - tl.load(out + 1, cache_modifier=".cg"))
    if REVERSE:  # the terms of both normalisations cancel
        difference = q * ((zx * cold_s - yx * cold_t) - tl.load(out + 6, cache_modifier=".cg"))
    elif TEACHER:  # normalise p and q in the exponent, so that equal logits have gradient exactly 0
        top_y = tl.load(out + 4, cache_modifier=".cg")
        p = tl.exp2((yx - top_y) * (cold_t * LOG2E) - tl.load(out + 5, cache_modifier=".cg"))
        difference = q - p
    q_ce = q
    if FACTORS and TEMPERED:
        q_ce = tl.exp2((zx - top) * LOG2E - tl.load(out + 2, cache_modifier=".cg"))
    pull = pull_of(
        difference, q_ce, x, row, labels, factors, results, V, kl_factor, smoothing, l2wrap, TEACHER, FACTORS, SMOOTH,
        WRAP,
    )  # fmt: skip
    tl.store(grad + row * stride_grad + x, pull.to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tasks"])
def rows_kernel(
    z, y, labels, factors, grad, kl, nll, smooth, same, trained, facts, results, arrived,
    tasks, V, stride_z, stride_y, stride_grad, cold_s, cold_t, kl_factor, smoothing, l2wrap, ignore_index,
    PARTS: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, LAG: tl.constexpr, TEACHER: tl.constexpr,
    LABELS: tl.constexpr, FACTORS: tl.constexpr, GRAD: tl.constexpr, TEMPERED: tl.constexpr, SMOOTH: tl.constexpr,
    WRAP: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """All tasks of one program. cold_s, cold_t: 1 / temperature; TEMPERED: the student's temperature is not 1;
    REVERSE (with TEACHER alone): the gradient is that of KL(student ‖ teacher)."""
    programs = tl.num_programs(0)
    end = tasks
    if GRAD:
        end = tasks + LAG * programs
    task = tl.program_id(0)
    while task < end:
        if task < tasks:
            _publish(
                task, z, y, labels, kl, nll, smooth, same, trained, facts, results, arrived,
                V, stride_z, stride_y, cold_s, cold_t, ignore_index,
                PARTS, POWER, BLOCK, TEACHER, LABELS, TEMPERED, SMOOTH, REVERSE,
            )  # fmt: skip
        if GRAD:
            earlier = task - LAG * programs
            if earlier >= 0:
                _write_gradient(
                    earlier, z, y, labels, factors, grad, results, arrived,
                    V, stride_z, stride_y, stride_grad, cold_s, cold_t, kl_factor, smoothing, l2wrap,
                    PARTS, BLOCK, TEACHER, FACTORS, TEMPERED, SMOOTH, WRAP, REVERSE,
                )  # fmt: skip
        task += programs


@triton.jit
def _expm1(x):
    """For x <= 0, near 0 as well."""
    u = tl.exp(x)
    plain = (u == 1) | (u < 0.5)
    return tl.where(plain, tl.where(u == 1, x, u - 1), (u - 1) * x / tl.where(plain, 1.0, tl.log(u)))


@triton.jit
def _log1p(x):
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def _against_mixture(z, y, row, x, inside, results, stride_z, stride_y, cold_s, cold_t, beta):
    """(q, p, log q - log m, log p - log m) of entries `x` of a row, m = beta p + (1 - beta) q; and the logits z."""
    out = results + row * RESULTS
    zx = tl.load(z + row * stride_z + x, mask=inside, other=0.0).to(tl.float32)
    yx = tl.load(y + row * stride_y + x, mask=inside, other=0.0).to(tl.float32)
    log_q = (zx - tl.load(out)) * (cold_s * LOG2E) - tl.load(out + 1)
    log_p = (yx - tl.load(out + 4)) * (cold_t * LOG2E) - tl.load(out + 5)
    q = tl.where(inside, tl.exp2(log_q), 0.0)
    p = tl.where(inside, tl.exp2(log_p), 0.0)
    gap = tl.where(inside, (log_p - log_q) / LOG2E, 0.0)
    least = -_log1p(tl.where(gap > 0, 1 - beta, beta) * _expm1(-tl.abs(gap)))
    return q, p, least - tl.maximum(gap, 0.0), least + tl.minimum(gap, 0.0), zx


@triton.jit
def jsd_kernel(
    z, y, labels, factors, grad, trained, results, V, stride_z, stride_y, stride_grad, cold_s, cold_t, kl_factor, beta,
    smoothing, l2wrap,
    BLOCK: tl.constexpr, FACTORS: tl.constexpr, GRAD: tl.constexpr, TEMPERED: tl.constexpr, SMOOTH: tl.constexpr,
    WRAP: tl.constexpr,
):  # fmt: skip
    """The generalized Jensen-Shannon divergence of a row and its gradient, which may overwrite z, after `rows_kernel`
    has made the row's results. Two more reads of the row: both distributions must be known before their mixture."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = start + tl.arange(0, BLOCK)
        q, p, of_q, of_p, _zx = _against_mixture(
            z, y, row, x, x < V, results, stride_z, stride_y, cold_s, cold_t, beta
        )  # fmt: skip
        total += beta * p * of_p + (1 - beta) * q * of_q
        mean += q * of_q
    tl.store(trained + row, tl.sum(total))
    if GRAD:
        centre = tl.sum(mean)
        for start in range(0, V, BLOCK):
            x = start + tl.arange(0, BLOCK)
            q, p, of_q, of_p, zx = _against_mixture(
                z, y, row, x, x < V, results, stride_z, stride_y, cold_s, cold_t, beta
            )  # fmt: skip
            q_ce = q
            if FACTORS and TEMPERED:
                q_ce = tl.exp2((zx - tl.load(results + row * RESULTS)) * LOG2E - tl.load(results + row * RESULTS + 2))
            pull = pull_of(
                (1 - beta) * q * (of_q - centre), q_ce, x, row, labels, factors, results, V, kl_factor, smoothing,
                l2wrap, True, FACTORS, SMOOTH, WRAP,
            )  # fmt: skip
            tl.debug_barrier()  # all threads have read their logits, which the gradient may overwrite
            tl.store(grad + row * stride_grad + x, pull.to(grad.dtype.element_ty), mask=x < V)


def triton_rows(
    z_nV: Tensor,
    y_nV: Tensor | None,
    labels_n: Tensor | None,
    ce_factor_n: Tensor | None,
    grad_nV: Tensor | None,
    settings: RowSettings,
    losses: RowLosses,
    *,
    block: int | None = None,
    warps: int | None = None,
    programs: int | None = None,
    registers: int | None = None,
    lag: int | None = None,
) -> None:
    """As `torch_rows`, except for fp64. A label outside the vocabulary gives a NaN loss.

    The keywords override the constants of this file, for benchmarks."""
    n, V = z_nV.shape
    device = z_nV.device
    labels_n, ce_factor_n = (None if x is None else x.contiguous() for x in (labels_n, ce_factor_n))
    block = min(block or _BLOCK, triton.next_power_of_2(V))
    parts = triton.cdiv(V, block)
    warps, registers = warps or _WARPS, registers or _REGISTERS
    options = {"num_warps": warps}
    grid = 1
    if z_nV.is_cuda:
        grid = max(1, min(n * parts, _together(device, programs or _PROGRAMS, warps, registers)))
        options["launch_cooperative_grid"] = True
        if torch.version.hip is None:
            options["maxnreg"] = registers
    jsd, tempered = y_nV is not None and settings.divergence == "jsd", settings.student_temperature != 1
    wraps, smooths = settings.l2wrap != 0, settings.smoothing != 0
    cold_s, cold_t = 1 / settings.student_temperature, 1 / settings.teacher_temperature
    facts = torch.empty(n * parts * FACTS.value, dtype=torch.float32, device=device)
    results = torch.empty(n * RESULTS.value, dtype=torch.float32, device=device)
    arrived = torch.zeros(n, dtype=torch.int32, device=device)
    with torch.cuda.device(device) if z_nV.is_cuda else nullcontext():
        rows_kernel[(grid,)](
            z_nV, y_nV, labels_n, ce_factor_n, grad_nV, *losses, facts, results, arrived,
            n * parts, V, z_nV.stride(0), 0 if y_nV is None else y_nV.stride(0),
            0 if grad_nV is None else grad_nV.stride(0),
            cold_s, cold_t, settings.kl_factor, settings.smoothing, settings.l2wrap, settings.ignore_index,
            PARTS=parts, POWER=triton.next_power_of_2(parts), BLOCK=block,
            LAG=max(lag or _LAG, triton.cdiv(parts, grid)), TEACHER=y_nV is not None, LABELS=labels_n is not None,
            FACTORS=ce_factor_n is not None, GRAD=grad_nV is not None and not jsd, TEMPERED=tempered, SMOOTH=smooths,
            WRAP=wraps, REVERSE=y_nV is not None and settings.divergence == "reverse", **options,
        )  # fmt: skip
        if jsd:
            jsd_kernel[(n,)](
                z_nV, y_nV, labels_n, ce_factor_n, grad_nV, losses.trained, results, V, z_nV.stride(0), y_nV.stride(0),
                0 if grad_nV is None else grad_nV.stride(0), cold_s, cold_t, settings.kl_factor, settings.jsd_beta,
                settings.smoothing, settings.l2wrap, BLOCK=block, FACTORS=ce_factor_n is not None,
                GRAD=grad_nV is not None, TEMPERED=tempered, SMOOTH=smooths, WRAP=wraps, num_warps=warps,
            )  # fmt: skip


def _together(device: torch.device, programs: int, warps: int, registers: int) -> int:
    """Programs that run on the GPU at once: `programs` per multiprocessor, or as many as fit."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        of_registers = properties.regs_per_multiprocessor // (32 * warps * triton.cdiv(registers, 8) * 8)
        room = min(of_registers, properties.max_threads_per_multi_processor // (32 * warps))
    else:
        room = 8 // warps  # two wavefronts per unit, each with up to 256 vector registers
    return properties.multi_processor_count * max(1, min(programs, room))
