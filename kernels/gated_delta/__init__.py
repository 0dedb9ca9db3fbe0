"""gated_delta: the gated delta rule (delta rule with a scalar decay per head); README.md holds the mathematics."""

from radlads.kernels.gated_delta.api import gated_delta, gated_delta_step

__all__ = ["gated_delta", "gated_delta_step"]
