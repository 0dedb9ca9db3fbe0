"""Losses and gradients of rows of logits in plain torch; `triton_rows.py` is the same as one kernel.

Dims: n rows (tokens), V vocabulary. Mathematics: README.md.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "jsd"]


class RowSettings(NamedTuple):
    """Settings of all rows. The gradient of a row is

    kl_factor g + ce_factor_n (softmax(z) - (1 - smoothing) onehot - smoothing / V) + l2wrap · z_top onehot(top)

    with g = q - p (forward), q (log q - log p - KL(q ‖ p)) (reverse) or, with m = β p + (1 - β) q,
    (1 - β) q (log q - log m - KL(q ‖ m)) (jsd).
    """

    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    kl_factor: float = 0.0
    smoothing: float = 0.0
    l2wrap: float = 0.0
    ignore_index: int = -100
    divergence: Divergence = "forward"
    jsd_beta: float = 0.5


class RowLosses(NamedTuple):
    """Unweighted losses per row, [n], in the accumulation dtype. nll: negative log likelihood; smooth: mean over the
    vocabulary of -log softmax; same: whether the top token equals the teacher's, or the label without a teacher;
    trained: the settings' divergence where that is not the forward KL, else as it was."""

    kl: Tensor
    nll: Tensor
    smooth: Tensor
    same: Tensor
    trained: Tensor


def torch_rows(
    z_nV: Tensor,
    y_nV: Tensor | None,
    labels_n: Tensor | None,
    ce_factor_n: Tensor | None,
    grad_nV: Tensor | None,
    settings: RowSettings,
    losses: RowLosses,
) -> None:
    """Write `losses` and, if given, `grad_nV` (which may share memory with z). Overwrites the logits z and y."""
    dtype = losses.kl.dtype
    z, tau = z_nV.to(dtype), settings.student_temperature
    top = z.argmax(-1, keepdim=True)
    top_value = z.gather(1, top) if settings.l2wrap and grad_nV is not None else None
    pull = None  # gradient of the CE term, at temperature 1
    if labels_n is not None:
        valid = labels_n != settings.ignore_index
        label = labels_n.where(valid, 0)[:, None]
        total = z.logsumexp(-1, keepdim=True)
        losses.nll.copy_((total - z.gather(1, label))[:, 0].where(valid, 0))
        if settings.smoothing:
            losses.smooth.copy_((total[:, 0] - z.mean(-1)).where(valid, 0))
        if y_nV is None:
            losses.same.copy_((top == label)[:, 0] & valid)
        if grad_nV is not None and ce_factor_n is not None:
            factor = ce_factor_n[:, None]
            pull = (z - total).exp_().mul_(factor)
            pull.scatter_add_(1, label, factor * (settings.smoothing - 1))
            if settings.smoothing:
                pull -= factor * (settings.smoothing / z.shape[1])
    if y_nV is not None:
        y = y_nV.to(dtype)
        losses.same.copy_((top == y.argmax(-1, keepdim=True))[:, 0])
        difference = _diverge(z.div_(tau), y.div_(settings.teacher_temperature), settings, losses)
        if grad_nV is not None and settings.kl_factor:
            difference.mul_(settings.kl_factor)
            pull = difference if pull is None else pull.add_(difference)
    if grad_nV is None:
        return
    if pull is None:
        pull = torch.zeros_like(z)
    if top_value is not None:
        pull.scatter_add_(1, top, top_value * settings.l2wrap)
    grad_nV.copy_(pull)


def _diverge(z_nV: Tensor, y_nV: Tensor, settings: RowSettings, losses: RowLosses) -> Tensor:
    """Write the divergences of logits over temperatures, which it overwrites. Returns the gradient g of `RowSettings`,
    [n,V]."""
    z = z_nV.sub_(z_nV.logsumexp(-1, keepdim=True))
    y = y_nV.sub_(y_nV.logsumexp(-1, keepdim=True))
    p, gap = y.exp(), y.sub_(z)
    if settings.divergence == "forward":
        losses.kl.copy_(gap.mul_(p).sum(-1))
        return z.exp_().sub_(p)
    losses.kl.copy_((p * gap).sum(-1))
    q = z.exp_()
    if settings.divergence == "jsd":
        return _jsd(p, q, gap, settings.jsd_beta, losses)
    reverse = torch.mul(q, gap, out=p).sum(-1, keepdim=True).neg_()
    losses.trained.copy_(reverse[:, 0])
    return gap.add_(reverse).mul_(q).neg_()


def _jsd(p: Tensor, q: Tensor, gap: Tensor, beta: float, losses: RowLosses) -> Tensor:
    """As `_diverge`, from both distributions and log p - log q. β p / m and its like neither overflow nor cancel."""
    share = (gap > 0).to(gap.dtype).mul_(1 - 2 * beta).add_(beta)  # of the rarer: 1 - beta where p > q, else beta
    least = torch.expm1(-gap.abs()).mul_(share).log1p_().neg_()
    of_p, of_q = least + gap.clamp(max=0), least - gap.clamp(min=0)  # log p - log m, log q - log m
    losses.trained.copy_((beta * p * of_p + (1 - beta) * q * of_q).sum(-1))
    return of_q.sub_((q * of_q).sum(-1, keepdim=True)).mul_(q).mul_(1 - beta)
