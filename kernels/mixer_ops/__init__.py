"""mixer_ops: what RWKV-7 mixers do between their projections and the recurrence, in one pass over memory."""

from radlads.kernels.mixer_ops.operands import Operands, wkv7_operands, wkv7_operands_reference

__all__ = ["Operands", "wkv7_operands", "wkv7_operands_reference"]
