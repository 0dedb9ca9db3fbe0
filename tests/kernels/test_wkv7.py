"""What is particular to wkv7 on the CPU: repeated removal keys, and the step that forms the removal itself. The rest is
in test_recurrences.py."""

from functools import partial

import pytest
import torch

from radlads.kernels.shared.testing import assert_as_good_as_the_loop, wkv7_inputs
from radlads.kernels.wkv7 import wkv7, wkv7_delta_step, wkv7_step


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("iclr", [0.5, 0.98])
def test_repeated_keys(period, iclr):
    """One key over and over brings the chunk's triangular matrix close to singular: powers of it would cancel."""
    inputs = wkv7_inputs(1, 200, 1, 16, period=period, iclr=iclr, log_decay=-1e-3)
    assert_as_good_as_the_loop(wkv7, partial(wkv7, backend="chunked"), inputs, tiny=1e-5)


def test_a_step_forms_the_removal_itself():
    r, log_decay, k, v, a, _ = (x.detach()[:, 0] for x in wkv7_inputs(2, 1, 3, 16, 24))
    kk, iclr = -a, torch.rand_like(a)
    state = torch.randn(2, 3, 16, 24)
    expected = state.clone()
    out = wkv7_delta_step(r, log_decay, k, v, kk, iclr, state)
    torch.testing.assert_close(out, wkv7_step(r, log_decay, k, v, -kk, kk * iclr, expected))
    torch.testing.assert_close(state, expected)
    with pytest.raises(ValueError, match="wkv7_delta_step: iclr must be"):
        wkv7_delta_step(r, log_decay, k, v, kk, iclr[:, :1], state)
