"""wkv6: linear attention with a decay per key channel (RAD-RWKV6); README.md holds the mathematics."""

from radlads.kernels.wkv6.api import wkv6, wkv6_step

__all__ = ["wkv6", "wkv6_step"]
