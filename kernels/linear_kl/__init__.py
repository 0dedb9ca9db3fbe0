"""linear_kl: losses from hidden states, head projection included, without materialising all logits; see README.md."""

from radlads.kernels.linear_kl.ce import linear_ce
from radlads.kernels.linear_kl.kl import linear_kl

__all__ = ["linear_ce", "linear_kl"]
