"""Distillation loss from hidden states: both heads, KL in either direction, optional cross entropy and all gradients in
one pass.

Dims: N tokens, D student width, E teacher width, V vocabulary. Mathematics: README.md.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.linear_kl.driver import Batch, run_batch
from radlads.kernels.linear_kl.products import accumulate_dtype, under_autocast
from radlads.kernels.linear_kl.rows import Divergence, RowSettings


def linear_kl(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    *,
    temperature: float = 1.0,
    student_temperature: float | None = None,
    teacher_temperature: float | None = None,
    labels_N: Tensor | None = None,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    ignore_index: int = -100,
    weight_N: Tensor | None = None,
    l2wrap: float = 0.0,
    divergence: Divergence = "forward",
    jsd_beta: float = 0.5,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """kl_weight · τ² KL + ce_weight · CE, means over tokens; never materialises the logits [N,V].

    KL is KL(teacher ‖ student), or with `divergence="reverse"` KL(student ‖ teacher) (MiniLLM, 2306.08543), which is
    large where the student gives mass to what the teacher excludes, or with "jsd" the generalized Jensen-Shannon
    divergence (GKD, 2306.13649) β KL(teacher ‖ m) + (1 - β) KL(student ‖ m), m = β teacher + (1 - β) student, β
    `jsd_beta` from 0.001 to 0.999.

    KL compares softmax(teacher logits / teacher_temperature) with softmax(student logits / student_temperature). Both
    temperatures default to `temperature`; τ is the student's, so the gradient scale is independent of it. CE has
    temperature 1 and covers the tokens whose label is not `ignore_index`; `labels_N[n]` is the token that `hidden[n]`
    predicts (shift before calling). `weight_N` (≥ 0) weights the tokens in all means; a mean over no tokens is 0.
    `l2wrap` adds l2wrap · z to the gradient of each token's largest logit z (RWKV's L2Wrap), weighted like the KL; it
    is not in the loss.

    Returns `(scalar fp32 loss, {"kl", "ce", "top1_agreement"})`, with "reverse_kl" or "jsd" among the metrics where
    that is the loss. The metrics are detached; `kl` is the forward one in any case, and all include τ²; `ce` is 0
    without labels. Gradients go to the student's hidden states and head only. bf16 and fp16 operands are multiplied
    with fp32 sums (fp64 stays fp64). `logits_dtype` is the dtype of logits in memory. None: fp32, except on NVIDIA
    Hopper, where the logits of forward KL are not stored (README.md). The operands' dtype rounds logits as a plain head
    does.
    Raises ValueError for mismatched shapes and an unknown divergence.
    """
    _check(student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE, labels_N, weight_N)
    tau = temperature if student_temperature is None else student_temperature
    teacher_tau = temperature if teacher_temperature is None else teacher_temperature
    if min(temperature, tau, teacher_tau) <= 0:
        raise ValueError(f"linear_kl: temperature must be positive, got {temperature}, {tau} and {teacher_tau}")
    if ce_weight != 0 and labels_N is None:
        raise ValueError("linear_kl: ce_weight needs labels_N")
    if divergence not in get_args(Divergence):
        raise ValueError(f"linear_kl: divergence must be one of {', '.join(get_args(Divergence))}, got {divergence!r}")
    if not 1e-3 <= jsd_beta <= 0.999:  # beyond, fp32 rounds the weight of one side away: its logarithm is infinite
        raise ValueError(f"linear_kl: jsd_beta must lie between 0.001 and 0.999, got {jsd_beta}")
    student, head = under_autocast(student_hidden_ND, student_head_VD)
    teacher, teacher_head = under_autocast(teacher_hidden_NE.detach(), teacher_head_VE.detach())
    settings = RowSettings(tau, teacher_tau, kl_weight * tau, 0.0, l2wrap, ignore_index, divergence, jsd_beta)
    loss, kl, ce, agreement, other = _LinearKl.apply(
        student, head, teacher, teacher_head, labels_N, weight_N, (kl_weight, ce_weight), settings,
        logits_dtype, torch.is_grad_enabled(),
    )  # fmt: skip
    named = {"forward": {}, "reverse": {"reverse_kl": other}, "jsd": {"jsd": other}}[divergence]
    return loss, {"kl": kl, **named, "ce": ce, "top1_agreement": agreement}


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
        weights: tuple[float, float],
        settings: RowSettings,
        logits_dtype: torch.dtype | None,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        N = student_ND.shape[0]
        scale_N = _normalised(weight_N, N, accumulate_dtype(student_ND, teacher_NE), student_ND.device)
        # CE is a mean over other tokens; ratio_N converts a row's scale to that of its CE term
        ratio_N = None if labels_N is None else _ce_ratio(scale_N, labels_N != settings.ignore_index)
        kl_weight, ce_weight = weights
        batch = Batch(
            student_ND,
            head_VD,
            scale_N,
            teacher_NE,
            teacher_head_VE,
            labels_N,
            ce_factor=ratio_N * ce_weight if ce_weight else None,
            want_hidden=grad and ctx.needs_input_grad[0],
            want_head=grad and ctx.needs_input_grad[1],
            logits_dtype=logits_dtype,
        )
        result = run_batch(batch, settings)
        ctx.save_for_backward(result.grad_hidden, *result.grad_head)
        ctx.dtypes = student_ND.dtype, head_VD.dtype
        kl, other = ((x @ scale_N) * settings.student_temperature**2 for x in (result.losses.kl, result.losses.trained))
        ce = kl.new_zeros(()) if ratio_N is None else result.losses.nll @ (scale_N * ratio_N)
        agreement = result.losses.same @ scale_N
        ctx.mark_non_differentiable(kl, ce, agreement, other)
        trained = kl if settings.divergence == "forward" else other
        return kl_weight * trained + ce_weight * ce, kl, ce, agreement, other

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, dloss), *(None,) * 8


def scaled_gradients(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The saved gradients (the head's in slabs) times the incoming scalar, in the dtypes of their tensors.

    The scalar keeps its precision, because it may be the weight of this batch among others: as a tensor of one
    dimension it makes the product use its dtype, and the result is rounded once.
    """
    hidden, *pieces = ctx.saved_tensors
    hidden_dtype, head_dtype = ctx.dtypes
    dloss = dloss.view(1)
    if hidden is not None:
        hidden = torch.mul(hidden, dloss, out=torch.empty_like(hidden, dtype=hidden_dtype))
    if not pieces:
        return hidden, None
    head = torch.empty(sum(map(len, pieces)), pieces[0].shape[1], dtype=head_dtype, device=pieces[0].device)
    start = 0
    for piece in pieces:
        torch.mul(piece, dloss, out=head[start : start + len(piece)])
        start += len(piece)
    return hidden, head


def _normalised(weight_N: Tensor | None, N: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights that sum to one, [N]; all zero if their sum is zero."""
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
                f"linear_kl: {name} hidden [N,D] and head [V,D] differ: {tuple(hidden.shape)}, {tuple(matrix.shape)}"
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
