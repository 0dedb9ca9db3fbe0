"""Distillation loss from hidden states: both heads, forward KL, optional cross entropy and all gradients in one pass.

Dims: N tokens, n tokens of one chunk, D student width, E teacher width, V vocabulary. Mathematics: README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.linear_kl.products import Operand, accumulate_dtype, chunk_rows, kept, under_autocast


class _Settings(NamedTuple):
    temperature: float
    teacher_temperature: float
    l2wrap: float
    ce_weight: float
    kl_weight: float
    ignore_index: int
    want_hidden: bool
    want_head: bool


def linear_kl(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    l2wrap: float = 0.0,
    labels_N: Tensor | None = None,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    ignore_index: int = -100,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """kl_weight · τ² KL(teacher ‖ student) + ce_weight · CE, means over tokens; the logits [N,V] never exist whole.

    KL compares softmax(logits / τ) of both sides; with `teacher_temperature` only the teacher's logits are divided and
    nothing is multiplied. `l2wrap` adds l2wrap·z to the gradient of every token's largest logit z, as a mean over
    tokens, and leaves the loss as it is (RWKV's L2Wrap). CE is at temperature 1, over the tokens whose label is not
    `ignore_index` (`labels_N[n]` is the token that `hidden[n]` predicts: shift before calling). `weight_N` (≥ 0) weighs
    tokens in every mean; a mean over no tokens is 0. Returns `(scalar fp32 loss, {"kl", "ce", "top1_agreement"})`, the
    metrics detached and `kl` with its τ²; without labels `ce` is 0. Gradients go to the student's hidden states and
    head, never to the teacher. bf16 and fp16 operands are multiplied with fp32 sums (fp64 stays fp64).
    Raises ValueError if shapes do not fit.
    """
    _check(student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE, labels_N, weight_N)
    if temperature <= 0 or (teacher_temperature is not None and teacher_temperature <= 0):
        raise ValueError(f"linear_kl: temperature must be positive, got {temperature}, {teacher_temperature}")
    if teacher_temperature is not None and temperature != 1:
        raise ValueError("linear_kl: temperature (both sides) and teacher_temperature exclude each other")
    if ce_weight != 0 and labels_N is None:
        raise ValueError("linear_kl: ce_weight needs labels_N")
    student, head = under_autocast(student_hidden_ND, student_head_VD)
    teacher, teacher_head = under_autocast(teacher_hidden_NE.detach(), teacher_head_VE.detach())
    grad = torch.is_grad_enabled()
    settings = _Settings(
        temperature,
        teacher_temperature or 1.0,
        l2wrap,
        ce_weight,
        kl_weight,
        ignore_index,
        grad and student.requires_grad,
        grad and head.requires_grad,
    )
    loss, kl, ce, agreement = _LinearKl.apply(student, head, teacher, teacher_head, labels_N, weight_N, settings)
    return loss, {"kl": kl, "ce": ce, "top1_agreement": agreement}


class _LinearKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_ND: Tensor,
        head_VD: Tensor,
        teacher_NE: Tensor,
        teacher_head_VE: Tensor,
        labels_N: Tensor | None,
        weight_N: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        N, V = student_ND.shape[0], head_VD.shape[0]
        dtype = accumulate_dtype(student_ND, teacher_NE)
        scale_N = _normalised(weight_N, N, dtype, student_ND.device)
        # CE has a mean of its own; ratio_N turns the common scale of a row into that of its CE term
        ratio_N = None if labels_N is None else _ce_ratio(scale_N, labels_N != settings.ignore_index)
        ours = Operand(head_VD, student_ND.dtype, dtype)
        theirs = Operand(teacher_head_VE, teacher_NE.dtype, dtype)
        kl = ce = agreement = scale_N.new_zeros(())
        grad_hidden = (
            torch.empty_like(student_ND, dtype=kept(scale_N, student_ND).dtype) if settings.want_hidden else None
        )
        grad_head = torch.zeros_like(head_VD, dtype=dtype) if settings.want_head else None
        rows = chunk_rows(N, V, student_ND.device)
        with torch.autocast(student_ND.device.type, enabled=False):
            for start in range(0, N, rows):
                here = slice(start, start + rows)
                scale, ratio = scale_N[here], None if ratio_N is None else ratio_N[here]
                labels = None if labels_N is None else labels_N[here]
                logits, targets = ours.logits(student_ND[here]), theirs.logits(teacher_NE[here])
                kl_n, ce_n, same_n, grad = _chunk(logits, targets, labels, ratio, settings)
                kl, agreement = kl + kl_n @ scale, agreement + same_n.to(dtype) @ scale
                if ce_n is not None:
                    ce = ce + ce_n @ (scale * ratio)
                if grad_hidden is not None:
                    grad_hidden[here] = ours.pull_back(grad) * scale[:, None]
                if grad_head is not None:
                    ours.add_outer(grad_head, grad, student_ND[here] * (scale * N)[:, None])
        if grad_head is not None:
            grad_head = kept(grad_head.div_(N), head_VD)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = student_ND.dtype, head_VD.dtype
        loss = settings.kl_weight * kl + settings.ce_weight * ce
        ctx.mark_non_differentiable(kl, ce, agreement)
        return loss, kl, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * dloss.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def _chunk(
    logits: Tensor, targets: Tensor, labels: Tensor | None, ratio: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """KL, CE and agreement of every token of a chunk, and the gradient of its logits before the token's scale.

    Works in place: both arguments [n,V] are spent.
    """
    tau, want = settings.temperature, settings.want_hidden or settings.want_head
    top, place = logits.max(-1, keepdim=True)
    same = place[:, 0] == targets.argmax(-1)
    total = logits.logsumexp(-1, keepdim=True)
    ce, label, softmax = None, None, None
    if labels is not None:
        label = labels.where(labels != settings.ignore_index, 0)[:, None]
        ce = (total - logits.gather(1, label))[:, 0].where(labels != settings.ignore_index, 0)
    if tau != 1:
        if want and settings.ce_weight:
            softmax = (logits - total).exp_()
        logits, targets = logits.div_(tau), targets.div_(tau)
        total = logits.logsumexp(-1, keepdim=True)
    if settings.teacher_temperature != 1:
        targets = targets.div_(settings.teacher_temperature)
    logits -= total
    targets -= targets.logsumexp(-1, keepdim=True)
    p = targets.exp()
    kl = targets.sub_(logits).mul_(p).sum(-1).mul_(tau * tau)
    if not want:
        return kl, ce, same, None
    q = logits.exp_()
    if settings.ce_weight:
        factor = ratio[:, None] * settings.ce_weight
        grad = q * factor if softmax is None else softmax.mul_(factor)
        grad.scatter_add_(1, label, -factor)
        grad.add_(q.sub_(p), alpha=settings.kl_weight * tau)
    else:
        grad = q.sub_(p).mul_(settings.kl_weight * tau)
    if settings.l2wrap:
        grad.scatter_add_(1, place, top * settings.l2wrap)
    return kl, ce, same, grad


def _normalised(weight_N: Tensor | None, N: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights that sum to one; all zero if there is nothing to weigh."""
    if weight_N is None:
        return torch.full((N,), 1 / max(N, 1), dtype=dtype, device=device)
    weight = weight_N.detach().to(dtype)
    total = weight.sum()
    return weight / total.where(total > 0, 1)


def _ce_ratio(scale_N: Tensor, valid_N: Tensor) -> Tensor:
    total = (scale_N * valid_N).sum()
    return valid_N / total.where(total > 0, 1)


def _check(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor | None, weight: Tensor | None
) -> None:
    for name, hidden, matrix in (("student", student, head), ("teacher", teacher, teacher_head)):
        if hidden.dim() != 2 or matrix.dim() != 2 or hidden.shape[1] != matrix.shape[1]:
            raise ValueError(
                f"linear_kl: {name} hidden [N,D] and head [V,D] misfit: {tuple(hidden.shape)}, {tuple(matrix.shape)}"
            )
    if student.shape[0] != teacher.shape[0] or head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            "linear_kl: student and teacher differ in tokens or vocabulary: "
            f"hidden {tuple(student.shape)} and {tuple(teacher.shape)}, "
            f"heads {tuple(head.shape)} and {tuple(teacher_head.shape)}"
        )
    for name, x in {"labels_N": labels, "weight_N": weight}.items():
        if x is not None and x.shape != student.shape[:1]:
            raise ValueError(f"linear_kl: {name} must be [{student.shape[0]}], got {tuple(x.shape)}")
