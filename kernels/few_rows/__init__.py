"""Products of a decoding step: a few rows with the weights of one layer (see README.md)."""

from radlads.kernels.few_rows.api import (
    MOST_ROWS,
    few_rows_apply,
    gated_linear,
    is_inference,
    linear_together,
    low_rank_pairs,
    silu_product,
)

__all__ = [
    "MOST_ROWS",
    "few_rows_apply",
    "gated_linear",
    "is_inference",
    "linear_together",
    "low_rank_pairs",
    "silu_product",
]
