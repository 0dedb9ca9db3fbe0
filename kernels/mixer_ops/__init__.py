"""mixer_ops: the steps of RWKV-7 mixers between projections and recurrence, in one pass over memory."""

from radlads.kernels.mixer_ops.api import wkv7_operands
from radlads.kernels.mixer_ops.reference import Operands, Residual, wkv7_operands_reference

__all__ = ["Operands", "Residual", "wkv7_operands", "wkv7_operands_reference"]
