"""wkv7: the RWKV-7 operator (generalized delta rule with a diagonal decay); README.md holds the mathematics."""

from radlads.kernels.wkv7.api import wkv7, wkv7_delta_step, wkv7_step

__all__ = ["wkv7", "wkv7_delta_step", "wkv7_step"]
