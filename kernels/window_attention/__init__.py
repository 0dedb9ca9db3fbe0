"""window_attention: softmax attention over a sequence's first tokens and its last ones; README.md has the details."""

from radlads.kernels.window_attention.api import window_attention, window_attention_step

__all__ = ["window_attention", "window_attention_step"]
