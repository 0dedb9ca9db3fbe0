"""Cross entropy from hidden states: head, loss and gradients in one pass. Dims: N tokens, D width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.linear_kl.driver import Batch, run_batch
from radlads.kernels.linear_kl.kl import scaled_gradients
from radlads.kernels.linear_kl.products import accumulate_dtype, under_autocast
from radlads.kernels.linear_kl.rows import RowSettings


def linear_ce(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross entropy over the tokens whose label is not `ignore_index`; never materialises the logits [N,V].

    `labels_N[n]` is the token that `hidden[n]` predicts (shift before calling). `label_smoothing` as in
    `torch.nn.functional.cross_entropy`. Returns `(scalar fp32 loss, {"ce", "accuracy", "num_tokens"})`; the metrics
    are detached, `ce` is without smoothing, and the loss is 0 without tokens. Gradients go to hidden states and head.
    Low-precision operands are multiplied with fp32 sums (fp64 stays fp64); `logits_dtype` as in `linear_kl`.
    Raises ValueError for mismatched shapes.
    """
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"linear_ce: hidden [N,D] and head [V,D] do not match: {tuple(hidden_ND.shape)} and {tuple(head_VD.shape)}"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"linear_ce: labels_N must be [{hidden_ND.shape[0]}], got {tuple(labels_N.shape)}")
    hidden, head = under_autocast(hidden_ND, head_VD)
    settings = RowSettings(smoothing=label_smoothing, ignore_index=ignore_index)
    loss, ce, accuracy, num_tokens = _LinearCe.apply(
        hidden, head, labels_N, settings, logits_dtype, torch.is_grad_enabled()
    )
    return loss, {"ce": ce, "accuracy": accuracy, "num_tokens": num_tokens}


class _LinearCe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        settings: RowSettings,
        logits_dtype: torch.dtype | None,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = accumulate_dtype(hidden_ND)
        valid_N = labels_N != settings.ignore_index
        num_tokens = valid_N.sum()
        divisor = num_tokens.clamp(min=1).to(dtype)
        batch = Batch(
            hidden_ND,
            head_VD,
            divisor.reciprocal().expand(len(labels_N)),
            labels=labels_N,
            ce_factor=valid_N.to(dtype),
            want_hidden=grad and ctx.needs_input_grad[0],
            want_head=grad and ctx.needs_input_grad[1],
            logits_dtype=logits_dtype,
        )
        result = run_batch(batch, settings)
        ctx.save_for_backward(result.grad_hidden, *result.grad_head)
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        ce, smooth, accuracy = (
            x.sum() / divisor for x in (result.losses.nll, result.losses.smooth, result.losses.same)
        )
        results = (1 - settings.smoothing) * ce + settings.smoothing * smooth, ce, accuracy, num_tokens
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, dloss), *(None,) * 4
