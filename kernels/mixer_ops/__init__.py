"""mixer_ops: the steps of RWKV-7 mixers between projections, recurrence and output, in one pass over memory each."""

from radlads.kernels.mixer_ops.api import rotate_heads, wkv7_delta_operands, wkv7_finish, wkv7_operands
from radlads.kernels.mixer_ops.plain import (
    AddedValues,
    Bonus,
    DeltaOperands,
    GroupNorm,
    Operands,
    Residual,
    StockKeys,
)

__all__ = [
    "AddedValues",
    "Bonus",
    "DeltaOperands",
    "GroupNorm",
    "Operands",
    "Residual",
    "StockKeys",
    "rotate_heads",
    "wkv7_delta_operands",
    "wkv7_finish",
    "wkv7_operands",
]
