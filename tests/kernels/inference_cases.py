"""Inputs of the products of few rows, and how far a form of theirs is from fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from radlads.kernels.inference import gated_linear, linear_together, low_rank_pairs, rms_norm, silu_product
from radlads.kernels.shared.testing import poisoned_memory, relative_rms

WIDTHS, RANKS = (40, 17, 128, 5, 64), (7, 32, 48, 16, 65)
ACTIVATIONS = ("tanh", None, "sigmoid", None, "tanh")
OPERATORS = (linear_together, low_rank_pairs, gated_linear, silu_product, rms_norm)


def given(
    operator: Callable[..., Any], rows: tuple[int, int], width: int, scale: int = 1, places: int = 5
) -> tuple[Any, ...]:
    """Arguments in fp64, of numbers that fp16 has; x differ from place to place, and one place in two has a bias.
    rows: [B,T]; scale: of all widths out and ranks."""
    torch.manual_seed(width + scale)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).half().double()

    widths, ranks = ([scale * size for size in sizes[:places]] for sizes in (WIDTHS, RANKS))
    xs = [normal(*rows, width) * width**0.5 for _ in range(places)]
    if operator is linear_together:
        return (
            xs,
            [normal(out, width) for out in widths],
            [normal(out) if i % 2 else None for i, out in enumerate(widths)],
        )
    if operator is low_rank_pairs:
        firsts = [normal(rank, width).T.contiguous() for rank in ranks]
        return xs, firsts, [normal(rank, out) for rank, out in zip(ranks, widths, strict=True)], ACTIVATIONS[:places]
    if operator is gated_linear:
        return xs[0], normal(scale * 70, width), normal(scale * 70, width)
    if operator is rms_norm:
        return normal(*rows, width), normal(width), 1e-6
    return normal(*rows, width), normal(*rows, width)


def moved(value: Any, **to: Any) -> Any:
    """Tensors of nested lists, moved."""
    if isinstance(value, torch.Tensor):
        return value.to(**to)
    return [moved(one, **to) for one in value] if isinstance(value, list | tuple) else value


def compare(operator: Callable[..., Any], arguments: tuple[Any, ...], dtype: torch.dtype, device: str) -> None:
    """Triton's form is no further from fp64 than torch's with the same bits, and writes all of its output."""
    same = moved(arguments, dtype=dtype, device=device)
    exact = operator(*moved(same, dtype=torch.float64), triton=False)
    plain = operator(*same, triton=False)
    with poisoned_memory():
        ours = operator(*same, triton=True)
    as_list = [x if isinstance(x, list) else [x] for x in (ours, plain, exact)]
    for mine, theirs in zip(*as_list[:2], strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == dtype
    # All places together: of a narrow low-rank map one rounding decides about the error.
    mine, theirs, truth = (torch.cat([x.flatten() for x in one]) for one in as_list)
    assert relative_rms(mine, truth) <= max(1.1 * relative_rms(theirs, truth), 1e-6)
