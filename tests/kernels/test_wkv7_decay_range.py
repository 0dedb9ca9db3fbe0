"""The watch over log decays: says what was wrong, late but surely, and never waits."""

import pytest
import torch

from radlads.kernels.shared.testing import wkv7_inputs
from radlads.kernels.wkv7 import wkv7
from radlads.kernels.wkv7.decay_range import DecayWatch, LogDecayRangeError, _Waiting, widest_log_decay


class Event:
    """A CUDA event that completes when told."""

    def __init__(self):
        self.done = False
        self.waited = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = self.waited = True


@pytest.mark.parametrize(("value", "bad"), [(-0.6, False), (0.0, False), (-5.0, False), (-5.2, True), (6.0, True)])
def test_the_next_look_tells(value, bad):
    watch = DecayWatch()
    decay = torch.full((1, 4, 2, 8), -0.3)
    watch.look(decay.index_fill(1, torch.tensor([2]), value), widest_log_decay(32))
    if bad:
        with pytest.raises(LogDecayRangeError, match=rf"log decay of {value:.3g}; .* backend='chunked'") as error:
            watch.look(decay, widest_log_decay(32))
        assert "\n" not in str(error.value)
    watch.look(decay, widest_log_decay(32))
    watch.settle()


def test_what_has_not_arrived_is_not_waited_for():
    watch, event = DecayWatch(), Event()
    watch._waiting.append(_Waiting(torch.tensor([-9.0, 0.0]), event, 5.1, (1, 2, 3, 4)))
    watch.look(torch.zeros(1, 1, 1, 1), 5.1)
    assert not event.waited
    event.done = True
    with pytest.raises(LogDecayRangeError, match=r"\(1, 2, 3, 4\) had a log decay of -9"):
        watch.look(torch.zeros(1, 1, 1, 1), 5.1)
    assert not event.waited


def test_settle_waits():
    watch, event = DecayWatch(), Event()
    watch._waiting.append(_Waiting(torch.tensor([-9.0, 0.0]), event, 5.1, (1,)))
    with pytest.raises(LogDecayRangeError):
        watch.settle()
    assert event.waited
    watch.settle()


def test_the_queue_does_not_grow_without_end():
    watch = DecayWatch()
    for _ in range(2000):
        watch._waiting.append(_Waiting(torch.zeros(2), Event(), 5.1, ()))
        if len(watch._waiting) > 200:
            watch.settle()
    watch.settle()
    assert not watch._waiting


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
def test_the_bound_is_where_the_exponents_end(chunk):
    """At the bound both factors of a pair at the ends of a chunk are finite and normal fp32 numbers."""
    exponent = torch.tensor(widest_log_decay(chunk) * (chunk // 2 + 1))
    assert exponent.exp().isfinite()
    assert (-exponent).exp() > torch.finfo(torch.float32).tiny / 2
    assert not (exponent * (1 + 1 / 32)).exp().isfinite()


@pytest.mark.parametrize("log_decay", [-5.5, -12.0, -100.0])
def test_the_way_out_that_the_message_names_is_right(log_decay):
    inputs = wkv7_inputs(1, 40, 1, 8, log_decay=log_decay)
    out, _ = wkv7(*inputs, backend="chunked")
    torch.testing.assert_close(out, wkv7(*inputs, backend="reference")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_on_the_gpu_without_a_wait():
    watch = DecayWatch()
    decay = torch.full((1, 64, 2, 64), -0.3, device="cuda")
    watch.look(decay, 5.1)
    watch.look(decay * 30, 5.1)
    with pytest.raises(LogDecayRangeError, match="log decay of -9"):
        watch.settle()


def test_callers_that_know_the_range_are_not_checked() -> None:
    watch, strong = DecayWatch(), torch.full((1, 4, 1, 2), -50.0)
    with watch.bounded():
        with watch.bounded():
            pass
        assert not watch.looks
        watch.look(strong, widest_log_decay(32))
    watch.settle()
    with pytest.raises(ZeroDivisionError), watch.bounded():
        1 / 0  # noqa: B018
    assert watch.looks
    watch.look(strong, widest_log_decay(32))
    with pytest.raises(LogDecayRangeError):
        watch.settle()
