"""A head product for NVIDIA Hopper that stores exponentials and sums instead of logits.

One program multiplies 128 tokens with 256 rows of the head (a part). While the 128 x 256 logits are in registers, it
computes for each token the maximum of the part and the sums of `triton_rows.py`. It stores
e^((z - maximum of the part) / temperature) in fp16: values in [0, 1] with relative error 2^-12, or, below 2^-14 of the
part's largest, with absolute error 2^-25 of it. The teacher's product runs first. The student's product reads the
teacher's exponentials, so KL is summed with fp32 student logits. Then `combine` computes the sums of the rows, and one
elementwise kernel converts both exponentials to the gradient, in place.

All sums use the rounded exponentials: both distributions sum to one, and equal logits give a gradient and KL of zero up
to the rounding of a few fp32 operations.

Dims: n tokens of a tile, D width, V vocabulary, P parts of a row.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from radlads.kernels.linear_kl.rows import RowLosses, RowSettings
from radlads.kernels.linear_kl.triton_rows import FACTS, LOG2E, RESULTS, combine, pull_of

TOKENS, PART, DEPTH = 128, 256, 64  # tile of a program; width per step
WARPS = 8  # two groups of four; each has half of the tokens
STAGES = 4
_GRADIENT_PARTS = 8  # parts per program of the elementwise kernel
_TEACHER = tl.constexpr(5)  # index of the first teacher fact


@triton.jit
def quarters(z, BM: tl.constexpr, BN: tl.constexpr):
    """Split the columns of a tile [BM,BN] into four pieces, without moving registers."""
    left, right = z.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
    a, b = left.reshape(BM, 2, BN // 4).permute(0, 2, 1).split()
    c, d = right.reshape(BM, 2, BN // 4).permute(0, 2, 1).split()
    return a, b, c, d


@triton.jit
def _inside(z, x, V, EVEN: tl.constexpr):
    if EVEN:
        return z
    return tl.where((x < V)[None, :], z, -float("inf"))


@triton.jit
def _sums(
    z, p, top, start, column, kept, V, cold, cold_other, KIND: tl.constexpr
):  # fmt: skip
    """Store the exponentials u of a piece of the tile. Returns the sums of u; of u at the other temperature; of u (or
    the teacher's p) times the base-2 exponent; and of the logits."""
    WIDTH: tl.constexpr = KIND[0]
    TEACHER: tl.constexpr = KIND[1]
    AGAINST: tl.constexpr = KIND[2]
    POWERED: tl.constexpr = KIND[3]
    SMOOTH: tl.constexpr = KIND[4]
    EVEN: tl.constexpr = KIND[5]
    x = column + tl.arange(0, WIDTH)
    plain = tl.zeros_like(top)
    if SMOOTH:
        plain = tl.sum(tl.where((x < V)[None, :], z, 0.0), 1)
    d = z * (cold * LOG2E) - (top * (cold * LOG2E))[:, None]
    u = tl.exp2(d).to(tl.float16)
    kept.store([start, column], u)
    u = u.to(tl.float32)
    total = tl.sum(u, 1)
    other = total
    if POWERED:
        other = tl.sum(tl.exp2((z - top[:, None]) * (cold_other * LOG2E)), 1)
    cross = plain
    if TEACHER or AGAINST:
        weighted = u * d
        if AGAINST:
            weighted = p.to(tl.float32) * d
        if not EVEN:
            weighted = tl.where((x < V)[None, :], weighted, 0.0)  # d is infinite there
        cross = tl.sum(weighted, 1)
    return total, other, cross, plain


@triton.jit
def _added(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@triton.jit
def product_kernel(
    hidden, head, kept, theirs, facts, n, V, stride_theirs, cold, cold_kl, cold_t, cold_other,
    D: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TEACHER: tl.constexpr,
    AGAINST: tl.constexpr, POWERED: tl.constexpr, SMOOTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute the facts and exponentials of all parts of n rows. hidden [n,D], head [V,D], kept [n,V]: tensor
    descriptors; theirs [n,V]: pointer. TEACHER: for the teacher. AGAINST: for the student, with the teacher's
    exponentials in `theirs`. cold: 1 / temperature of the exponentials; cold_kl: 1 / temperature of KL. POWERED: also
    sum at temperature 1 / `cold_other`; 1: for CE, 2: for KL (the stored exponentials are then those of CE)."""
    row_tiles = tl.cdiv(n, BM)
    Q: tl.constexpr = BN // 4
    for tile in tl.range(tl.program_id(0), row_tiles * PARTS, tl.num_programs(0), flatten=True):
        start = (tile % row_tiles) * BM
        at = tile // row_tiles * BN
        z = tl.zeros([BM, BN], tl.float32)
        for k in range(0, D, BK):
            z = tl.dot(hidden.load([start, k]), head.load([at, k]).T, z)
        rows = start + tl.arange(0, BM)
        real = rows < n
        x = at + tl.arange(0, Q)
        kind: tl.constexpr = (Q, TEACHER, AGAINST, POWERED, SMOOTH, EVEN)
        p0, p1, p2, p3 = 0, 0, 0, 0
        if AGAINST:  # load early, to overlap with the computation below
            source = theirs + rows.to(tl.int64)[:, None] * stride_theirs + x[None, :]
            p0 = tl.load(source, mask=real[:, None], other=0.0)
            p1 = tl.load(source + Q, mask=real[:, None], other=0.0)
            p2 = tl.load(source + 2 * Q, mask=real[:, None], other=0.0)
            p3 = tl.load(source + 3 * Q, mask=real[:, None], other=0.0)
        z0, z1, z2, z3 = quarters(z, BM, BN)
        z0 = _inside(z0, x, V, EVEN)
        z1 = _inside(z1, x + Q, V, EVEN)
        z2 = _inside(z2, x + 2 * Q, V, EVEN)
        z3 = _inside(z3, x + 3 * Q, V, EVEN)
        top = tl.max(tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)), 1)
        sums = _sums(z0, p0, top, start, at, kept, V, cold, cold_other, kind)
        sums = _added(sums, _sums(z1, p1, top, start, at + Q, kept, V, cold, cold_other, kind))
        sums = _added(sums, _sums(z2, p2, top, start, at + 2 * Q, kept, V, cold, cold_other, kind))
        sums = _added(sums, _sums(z3, p3, top, start, at + 3 * Q, kept, V, cold, cold_other, kind))
        total, other, cross, plain = sums
        mine = facts + rows.to(tl.int64) * (FACTS * PARTS) + tile // row_tiles
        if SMOOTH:
            tl.store(mine + 4 * PARTS, plain, mask=real)
        cross *= cold_kl / (cold * LOG2E)
        if TEACHER:
            mine += _TEACHER * PARTS
            tl.store(mine + 2 * PARTS, cross, mask=real)
        if POWERED:
            tl.store(mine + 2 * PARTS, total if POWERED == 2 else other, mask=real)
            total = other if POWERED == 2 else total
        if AGAINST:  # sum of p (y - z), each relative to its own maximum; the teacher stored its term
            there = mine + _TEACHER * PARTS
            top_t = tl.load(there, mask=real, other=0.0)
            total_t = tl.load(there + PARTS, mask=real, other=0.0)
            of_teacher = tl.load(there + 2 * PARTS, mask=real, other=0.0)
            cross = of_teacher - cross + total_t * (top_t * cold_t - top * cold_kl)
            tl.store(there + 2 * PARTS, cross, mask=real)
        tl.store(mine, top, mask=real)
        tl.store(mine + PARTS, total, mask=real)


@triton.jit
def _top_place(kept, stride, facts, row, V, PARTS: tl.constexpr, POWER: tl.constexpr, BN: tl.constexpr):
    """Position of the largest logit of a row: the first one whose exponential is 1, the maximum."""
    i = tl.arange(0, POWER)
    part = tl.argmax(tl.load(facts + i, mask=i < PARTS, other=-float("inf")), 0)
    x = part * BN + tl.arange(0, BN)
    u = tl.load(kept + row * stride + x, mask=x < V, other=0.0)
    return tl.min(tl.where(u == tl.max(u, 0), x, V), 0).to(tl.float32)


@triton.jit
def label_kernel(
    hidden, head, labels, of_label, V, stride_hidden, stride_head, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The label's logit for one row; 0 for a label outside the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    known = (label >= 0) & (label < V)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + row * stride_hidden + k, mask=k < D, other=0.0).to(tl.float32)
        w = tl.load(head + label * stride_head + k, mask=(k < D) & known, other=0.0).to(tl.float32)
        products += x * w
    tl.store(of_label + row, tl.sum(products, 0))


@triton.jit
def combine_kernel(
    ours, theirs, labels, of_label, kl, nll, smooth, same, trained, facts, results, V, stride_ours, stride_theirs,
    cold_s, cold_t, ignore_index,
    PARTS: tl.constexpr, POWER: tl.constexpr, BN: tl.constexpr, TEACHER: tl.constexpr, LABELS: tl.constexpr,
    TEMPERED: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Compute losses and results of one row."""
    row = tl.program_id(0).to(tl.int64)
    logit = 0.0
    if LABELS:
        logit = tl.load(of_label + row)
    mine = facts + row * (FACTS * PARTS)
    top_at = _top_place(ours, stride_ours, mine, row, V, PARTS, POWER, BN)
    top_y_at = top_at
    if TEACHER:
        top_y_at = _top_place(theirs, stride_theirs, mine + _TEACHER * PARTS, row, V, PARTS, POWER, BN)
    combine(
        row, logit, top_at, top_y_at, labels, kl, nll, smooth, same, trained, facts, results, V, cold_s, cold_t,
        ignore_index, PARTS, POWER, TEACHER, LABELS, TEMPERED, SMOOTH, False,
    )  # fmt: skip


@triton.jit
def gradient_kernel(
    ours, theirs, grad, labels, factors, facts, results, V, stride_ours, stride_theirs, stride_grad,
    cold_s, cold_t, power, kl_factor, smoothing, l2wrap,
    PARTS: tl.constexpr, BN: tl.constexpr, TAKEN: tl.constexpr, TEACHER: tl.constexpr, FACTORS: tl.constexpr,
    TEMPERED: tl.constexpr, POWERED: tl.constexpr, SMOOTH: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of TAKEN parts of a row; `grad` may share memory with `ours`."""
    groups: tl.constexpr = (PARTS + TAKEN - 1) // TAKEN
    row = (tl.program_id(0) // groups).to(tl.int64)
    part = (tl.program_id(0) % groups) * TAKEN + tl.arange(0, TAKEN)
    x = part[:, None] * BN + tl.arange(0, BN)[None, :]
    inside = x < V
    there = facts + row * (FACTS * PARTS) + part
    out = results + row * RESULTS
    u = tl.load(ours + row * stride_ours + x, mask=inside, other=0.0).to(tl.float32)
    top = tl.load(there, mask=part < PARTS, other=-float("inf")) - tl.load(out)
    q = u
    q_ce = u
    if POWERED == 1:
        q_ce = tl.exp2(tl.log2(u) * power)
    if POWERED == 2:
        q = tl.exp2(tl.log2(u) * power)
    if TEACHER or not TEMPERED:
        q *= tl.exp2(top * (cold_s * LOG2E) - tl.load(out + 1))[:, None]
    if TEMPERED:
        q_ce *= tl.exp2(top * LOG2E - tl.load(out + 2))[:, None]
    else:
        q_ce = q
    p = q
    if TEACHER:
        top = tl.load(there + _TEACHER * PARTS, mask=part < PARTS, other=-float("inf")) - tl.load(out + 4)
        p = tl.load(theirs + row * stride_theirs + x, mask=inside, other=0.0).to(tl.float32)
        p *= tl.exp2(top * (cold_t * LOG2E) - tl.load(out + 5))[:, None]
    pull = pull_of(
        q - p, q_ce, x, row, labels, factors, results, V, kl_factor, smoothing, l2wrap, TEACHER, FACTORS, SMOOTH, WRAP
    )
    tl.store(grad + row * stride_grad + x, pull.to(grad.dtype.element_ty), mask=inside)


def takes(hidden: Tensor, head: Tensor) -> bool:
    """Whether the products support these operands: one 16-bit dtype, contiguous rows, row strides and addresses in
    multiples of 16 bytes."""
    D = hidden.shape[1]
    if hidden.dtype != head.dtype or hidden.dtype.itemsize != 2 or D == 0 or D % 8:
        return False
    return all(
        x.stride(1) == 1 and x.stride(0) >= D and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in (hidden, head)
    )


def resident(tiles: int, x: Tensor) -> int:
    """Number of persistent programs for a number of tiles: at most one per multiprocessor of the GPU of x."""
    if not x.is_cuda:
        return tiles
    return min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)


def product_rows(
    hidden_nD: Tensor,
    head_VD: Tensor,
    teacher_nE: Tensor | None,
    teacher_head_VE: Tensor | None,
    labels_n: Tensor | None,
    ce_factor_n: Tensor | None,
    ours_nV: Tensor,
    theirs_nV: Tensor | None,
    grad_nV: Tensor | None,
    settings: RowSettings,
    losses: RowLosses,
) -> None:
    """Write the losses of n tokens from their hidden states and, if given, the gradient of their logits.

    `ours_nV` and `theirs_nV` (fp16) are buffers for the exponentials, views of rows padded to whole parts; `grad_nV`
    may share memory with `ours_nV`. A label outside the vocabulary gives a NaN loss. Raises ValueError for other
    divergences than forward KL: the teacher's log probabilities cannot be had back from its exponentials, where these
    are small.
    """
    if settings.divergence != "forward":
        raise ValueError(f"the products that sum their rows compute forward KL alone, not {settings.divergence}")
    n, V = hidden_nD.shape[0], head_VD.shape[0]
    device = hidden_nD.device
    labels_n, ce_factor_n = (None if x is None else x.contiguous() for x in (labels_n, ce_factor_n))
    tau = settings.student_temperature
    cold_s, cold_t = 1 / tau, 1 / settings.teacher_temperature
    tempered, labelled, taught = tau != 1, labels_n is not None, teacher_nE is not None
    powered, cold, other = 0, cold_s, 1.0
    if tempered and labelled:  # store at the higher temperature, so that relevant values do not underflow
        powered, cold, other = (1, cold_s, 1.0) if tau > 1 else (2, 1.0, cold_s)
    stride_theirs = 0 if theirs_nV is None else theirs_nV.stride(0)
    parts = triton.cdiv(V, PART)
    facts = torch.empty(n * parts * FACTS.value, dtype=torch.float32, device=device)
    results = torch.empty(n * RESULTS.value, dtype=torch.float32, device=device)
    of_label = torch.empty(n, dtype=torch.float32, device=device) if labelled else None
    shared = {"PARTS": parts, "TEACHER": taught, "SMOOTH": settings.smoothing != 0}
    with torch.cuda.device(device) if hidden_nD.is_cuda else nullcontext():
        if taught:
            _multiply(teacher_nE, teacher_head_VE, theirs_nV, facts, (cold_t, cold_t, cold_t, 1.0), TEACHER=True)
        _multiply(
            hidden_nD, head_VD, ours_nV, facts, (cold, cold_s, cold_t, other), theirs_nV, POWERED=powered,
            SMOOTH=settings.smoothing != 0,
        )  # fmt: skip
        if labelled:
            label_kernel[(n,)](
                hidden_nD, head_VD, labels_n, of_label, V, hidden_nD.stride(0), head_VD.stride(0),
                D=hidden_nD.shape[1], BLOCK=512, num_warps=4,
            )  # fmt: skip
        combine_kernel[(n,)](
            ours_nV, theirs_nV, labels_n, of_label, *losses, facts, results, V, ours_nV.stride(0), stride_theirs,
            cold_s, cold_t, settings.ignore_index, BN=PART, POWER=triton.next_power_of_2(parts), LABELS=labelled,
            TEMPERED=tempered, num_warps=4, **shared,
        )  # fmt: skip
        if grad_nV is None:
            return
        taken = min(_GRADIENT_PARTS, triton.next_power_of_2(parts))
        gradient_kernel[(n * triton.cdiv(parts, taken),)](
            ours_nV, theirs_nV, grad_nV, labels_n, ce_factor_n, facts, results, V, ours_nV.stride(0),
            stride_theirs, grad_nV.stride(0), cold_s, cold_t, other / cold,
            settings.kl_factor, settings.smoothing, settings.l2wrap, BN=PART, TAKEN=taken,
            FACTORS=ce_factor_n is not None, TEMPERED=tempered, POWERED=powered, WRAP=settings.l2wrap != 0,
            num_warps=4, **shared,
        )  # fmt: skip


def _multiply(
    hidden: Tensor,
    head: Tensor,
    kept: Tensor,
    facts: Tensor,
    numbers: tuple[float, float, float, float],
    theirs: Tensor | None = None,
    TEACHER: bool = False,
    POWERED: int = 0,
    SMOOTH: bool = False,
) -> None:
    n, (V, D) = hidden.shape[0], head.shape
    parts = triton.cdiv(V, PART)
    product_kernel[(resident(triton.cdiv(n, TOKENS) * parts, hidden),)](
        TensorDescriptor.from_tensor(hidden, [TOKENS, DEPTH]),
        TensorDescriptor.from_tensor(head, [PART, DEPTH]),
        TensorDescriptor.from_tensor(kept, [TOKENS, PART // 4]),
        theirs, facts, n, V, 0 if theirs is None else theirs.stride(0), *numbers,
        D=D, PARTS=parts, BM=TOKENS, BN=PART, BK=DEPTH, TEACHER=TEACHER, AGAINST=theirs is not None,
        POWERED=POWERED, SMOOTH=SMOOTH, EVEN=V % PART == 0, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
