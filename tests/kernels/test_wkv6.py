"""What is particular to wkv6 on the CPU: its floor of decay. The rest is in test_recurrences.py."""

from functools import partial

import pytest
import torch

from radlads.kernels.shared.testing import (
    WKV6_FLOOR,
    assert_as_good_as_the_loop,
    relative_rms,
    state_like,
    wkv6_inputs,
)
from radlads.kernels.wkv6 import wkv6


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 4e-6), (torch.bfloat16, 1e-4)])
def test_channels_at_the_floor_beside_channels_without_decay(dtype, tiny):
    inputs = wkv6_inputs(1, 100, 2, 16, dtype=dtype)
    with torch.no_grad():
        inputs[1][..., ::2], inputs[1][..., 1::4] = WKV6_FLOOR, 0.0
        inputs[2].copy_(torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(2)))
    assert_as_good_as_the_loop(wkv6, partial(wkv6, backend="chunked"), inputs, state_like(1, 2, 16, 16), tiny=tiny)


def test_small_gradients_survive_the_floor():
    """A loss over many tokens has gradients of 1e-9 and less; exp(-40) of them must not be lost."""
    inputs = wkv6_inputs(1, 33, 1, 8, log_decay=WKV6_FLOOR)
    out, _ = wkv6(*inputs)
    expected, _ = wkv6(*inputs, backend="reference")
    for ours, reference in zip(
        torch.autograd.grad(out.sum() * 1e-12, inputs), torch.autograd.grad(expected.sum() * 1e-12, inputs), strict=True
    ):
        assert relative_rms(ours, reference) < 1e-4
