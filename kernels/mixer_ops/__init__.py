"""mixer_ops: what RWKV-7 mixers do between their projections and the recurrence, in one pass over memory."""

from radlads.kernels.mixer_ops.api import wkv7_operands
from radlads.kernels.mixer_ops.reference import Operands, Residual, wkv7_operands_reference

__all__ = ["Operands", "Residual", "wkv7_operands", "wkv7_operands_reference"]
