"""Kernels without gradients: the products of a decoding step, norms, and the activation of MLPs."""

from radlads.kernels.inference.api import (
    MOST_ROWS,
    few_rows_apply,
    gated_linear,
    is_inference,
    linear_together,
    low_rank_pairs,
    rms_norm,
    silu_product,
)

__all__ = [
    "MOST_ROWS",
    "few_rows_apply",
    "gated_linear",
    "is_inference",
    "linear_together",
    "low_rank_pairs",
    "rms_norm",
    "silu_product",
]
