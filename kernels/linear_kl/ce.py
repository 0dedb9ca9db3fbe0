"""Cross entropy from hidden states: head, loss and gradients in one pass over chunks of tokens.

Dims: N tokens, n tokens of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.linear_kl.products import Operand, accumulate_dtype, chunk_rows, kept, under_autocast


class _Settings(NamedTuple):
    label_smoothing: float
    ignore_index: int
    want_hidden: bool
    want_head: bool


def linear_ce(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross entropy over the tokens whose label is not `ignore_index`; the logits [N,V] never exist whole.

    `labels_N[n]` is the token that `hidden[n]` predicts: shift before calling. `label_smoothing` as in
    `torch.nn.functional.cross_entropy`. Returns `(scalar fp32 loss, {"ce", "accuracy", "num_tokens"})`, the metrics
    detached, `ce` free of smoothing; without any token the loss is 0. Gradients to the hidden states and the head.
    Low-precision operands are multiplied with fp32 sums (fp64 stays fp64). Raises ValueError if shapes do not fit.
    """
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"linear_ce: hidden [N,D] and head [V,D] do not fit: {tuple(hidden_ND.shape)} and {tuple(head_VD.shape)}"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"linear_ce: labels_N must be [{hidden_ND.shape[0]}], got {tuple(labels_N.shape)}")
    hidden, head = under_autocast(hidden_ND, head_VD)
    grad = torch.is_grad_enabled()
    settings = _Settings(label_smoothing, ignore_index, grad and hidden.requires_grad, grad and head.requires_grad)
    loss, ce, accuracy, num_tokens = _LinearCe.apply(hidden, head, labels_N, settings)
    return loss, {"ce": ce, "accuracy": accuracy, "num_tokens": num_tokens}


class _LinearCe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        N, V = hidden_ND.shape[0], head_VD.shape[0]
        dtype = accumulate_dtype(hidden_ND)
        operand = Operand(head_VD, hidden_ND.dtype, dtype)
        valid_N = labels_N != settings.ignore_index
        num_tokens = valid_N.sum()
        divisor = num_tokens.clamp(min=1)
        loss = ce = correct = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND, dtype=kept(loss, hidden_ND).dtype) if settings.want_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=dtype) if settings.want_head else None
        rows = chunk_rows(N, V, hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, N, rows):
                here = slice(start, start + rows)
                valid = valid_N[here]
                label = labels_N[here].where(valid, 0)
                log_p = operand.logits(hidden_ND[here])
                correct = correct + ((log_p.argmax(-1) == label) & valid).sum()
                log_p -= log_p.logsumexp(-1, keepdim=True)
                nll = -log_p.gather(1, label[:, None])[:, 0].where(valid, 0).sum()
                ce = ce + nll
                smooth = -log_p.mean(-1).where(valid, 0).sum() if settings.label_smoothing else 0.0
                loss = loss + (1 - settings.label_smoothing) * nll + settings.label_smoothing * smooth
                if grad_hidden is None and grad_head is None:
                    continue
                grad = _logit_gradient(log_p, label, valid, settings.label_smoothing)
                if grad_hidden is not None:
                    grad_hidden[here] = operand.pull_back(grad) / divisor
                if grad_head is not None:
                    operand.add_outer(grad_head, grad, hidden_ND[here])
        if grad_head is not None:
            grad_head = kept(grad_head.div_(divisor), head_VD)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        results = loss / divisor, ce / divisor, correct / divisor, num_tokens
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * dloss.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None


def _logit_gradient(log_p: Tensor, label: Tensor, valid: Tensor, smoothing: float) -> Tensor:
    """softmax - (1 - s) onehot - s / V, zero in ignored rows; spends `log_p` [n,V]."""
    grad = log_p.exp_()
    grad.scatter_add_(1, label[:, None], torch.full_like(label[:, None], smoothing - 1, dtype=grad.dtype))
    if smoothing:
        grad -= smoothing / grad.shape[1]
    return grad.mul_(valid[:, None])
