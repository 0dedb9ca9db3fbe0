"""Which kernel ran, and why no faster one: once in the log, and in the record that manifests keep."""

import logging

import pytest
import torch

from radlads.kernels.linear_kl import linear_ce
from radlads.kernels.shared.chosen import chosen_kernels, forget_kernels, note_kernel
from radlads.kernels.shared.testing import wkv6_inputs, wkv7_inputs
from radlads.kernels.wkv6 import wkv6
from radlads.kernels.wkv7 import wkv7


@pytest.fixture(autouse=True)
def fresh():
    forget_kernels()
    yield
    forget_kernels()


def test_the_log_says_it_once(caplog):
    with caplog.at_level(logging.INFO, logger="radlads"):
        for _ in range(3):
            wkv7(*wkv7_inputs(1, 4, 1, 8))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["kernel wkv7: chunked (plain torch) (the tensors are on cpu, not on a GPU)"]


def test_every_operator_is_recorded():
    wkv7(*wkv7_inputs(1, 4, 1, 8), backend="reference")
    wkv6(*wkv6_inputs(1, 4, 1, 8))
    linear_ce(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))
    assert chosen_kernels() == {
        "linear_kl": "library products, rows by plain torch (the tensors are on cpu, not on a GPU)",
        "wkv6": "chunked (plain torch) (the tensors are on cpu, not on a GPU)",
        "wkv7": "reference (plain torch) (requested)",
    }


def test_the_reason_is_asked_for_once():
    asked = []
    for _ in range(2):
        note_kernel("op", "slow", lambda: asked.append(1) or "because")
    note_kernel("op", "fast")
    assert len(asked) == 1
    assert chosen_kernels() == {"op": "slow (because); fast"}


def test_why_wkv7_took_slower_kernels(monkeypatch):
    pytest.importorskip("triton")
    from radlads.kernels.wkv7 import triton_tuning
    from radlads.kernels.wkv7.triton_tuning import Call, Fused, name_form, why_slower

    half, single = torch.bfloat16, torch.float32

    def why(tuning=None, K=64, heads=1000, dtype=half, log_decay=half, hopper=False):
        monkeypatch.setattr(triton_tuning, "is_hopper", lambda device: hopper)
        monkeypatch.setattr(triton_tuning, "_gluon", lambda: True)
        return why_slower(tuning, Call(K, K, heads, dtype, log_decay, "cuda"), None)

    assert why(Fused(1, 4, 1, 4, 1)) == ""
    assert why(Fused(1, 4, 1, 4, 1, hopper=True), hopper=True) == ""
    assert "the log decay is float32" in why(Fused(1, 4, 1, 4, 1), log_decay=single, hopper=True)
    assert why(dtype=single) == "the inputs are float32, the fused kernels take 16 bits"
    assert why(K=256) == "the fused kernels do not take K=256, V=256"
    assert why(heads=8).startswith("8 heads in all sequences would leave the GPU idle")
    assert why(heads=8, hopper=True).endswith("faster from 18")
    assert name_form(None) == "triton, chunks in parallel"
