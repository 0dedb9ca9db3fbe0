"""What is particular to gated_delta: its range, what others computed, and fla's kernels on a GPU. The rest is in
test_recurrences.py."""

import logging
from functools import partial
from itertools import pairwise

import pytest
import torch

from radlads.kernels.gated_delta import api, fla_op, gated_delta, gated_delta_step
from radlads.kernels.gated_delta.fla_op import why_not_applicable
from radlads.kernels.shared import backends
from radlads.kernels.shared.chosen import chosen_kernels, forget_kernels
from radlads.kernels.shared.testing import (
    GATED_DELTA_NAMES,
    assert_as_good_as_the_loop,
    assert_autograd_rules,
    gated_delta_inputs,
    outputs_and_gradients,
    relative_rms,
    state_like,
)
from radlads.kernels.wkv7 import wkv7

run = partial(outputs_and_gradients, gated_delta, names=GATED_DELTA_NAMES)


def assert_right(inputs):
    """fp32, heads of 16; a chunk sums up to 64 products where the loop adds one at a time."""
    chunked, state = partial(gated_delta, backend="chunked"), state_like(1, 2, 16, 16)
    assert_as_good_as_the_loop(gated_delta, chunked, inputs, state, tiny=4e-6, names=GATED_DELTA_NAMES)


def test_strong_decays_beside_weak_ones():
    """The cumulative log decay of a chunk reaches 2,000, and the differences of weak tokens must survive that."""
    inputs = gated_delta_inputs(1, 130, 2, 16, log_decay=-1e-3)
    with torch.no_grad():
        inputs[3][:, ::2] = -60.0
        inputs[3][:, 65::7] = -0.5
    assert_right(inputs)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("period", [1, 3])
def test_one_key_over_and_over(period, beta):
    """Padding, "aaaa": powers of the triangle would grow like binomials before they cancel. Mixers' beta is a sigmoid:
    both its ends, and what lies between."""
    assert_right(gated_delta_inputs(1, 130, 2, 16, log_decay=-1e-3, beta=beta, period=period))


def test_it_is_wkv7_with_one_decay_a_head():
    """The same recurrence in another operator's terms: a reads with k, b writes -decay · beta · k."""
    q, k, v, log_decay, beta = (x.detach() for x in gated_delta_inputs(2, 150, 3, 16, log_decay=-0.2))
    wide, rate = log_decay[..., None].expand_as(k), beta[..., None]
    expected, expected_state = wkv7(q, wide, k * rate, v, k, -wide.exp() * rate * k, output_final_state=True)
    out, state = gated_delta(q, k, v, log_decay, beta, output_final_state=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


def test_transformers_own_code_agrees():
    """The torch form of Qwen3-Next (and 3.5) and ours, forward and backward, fp32; theirs scales by 1/sqrt(K)."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as theirs

    inputs, state = gated_delta_inputs(2, 150, 3, 16, 24), state_like(2, 3, 16, 24)

    def operator(q, k, v, log_decay, beta, *, initial_state, output_final_state):
        return theirs(
            q * 16**0.5, k, v, log_decay, beta, initial_state=initial_state, output_final_state=output_final_state
        )

    expected = outputs_and_gradients(operator, inputs, state, names=GATED_DELTA_NAMES)
    for key, found in run(inputs, state).items():
        assert relative_rms(found, expected[key]) < 2e-5, key


def test_flash_linear_attentions_own_loop_agrees():
    """Without a GPU too, where fla-core is installed: its naive form and ours."""
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="fla-core is not installed")
    q, k, v, log_decay, beta = (x.detach() for x in gated_delta_inputs(2, 90, 3, 16, 24))
    for theirs in (naive.naive_recurrent_gated_delta_rule, naive.naive_chunk_gated_delta_rule):
        expected, expected_state = theirs(q, k, v, g=log_decay, beta=beta, scale=1.0, output_final_state=True)
        out, state = gated_delta(q, k, v, log_decay, beta, output_final_state=True)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


def test_gates_that_are_no_numbers_of_a_head_are_refused():
    q, k, v, log_decay, beta = gated_delta_inputs(2, 10, 2, 8)
    with pytest.raises(ValueError, match=r"beta must be \[B,T,H\] \(2, 10, 2\), got \(2, 10, 2, 1\)"):
        gated_delta(q, k, v, log_decay, beta[..., None])
    inputs = [x[:1, 0] for x in (q, k, v, log_decay, beta)]
    inputs[4] = inputs[4][:, :1]
    with pytest.raises(ValueError, match=r"beta must be \(1, 2\) to fit the state"):
        gated_delta_step(*inputs, torch.zeros(1, 2, 8, 8))


def test_which_form_ran_is_recorded(caplog):
    forget_kernels()
    with caplog.at_level(logging.INFO, logger="radlads"):
        gated_delta(*gated_delta_inputs(1, 4, 1, 8))
    said = "chunked (plain torch) (the tensors are on cpu, not on a GPU)"
    assert chosen_kernels() == {"gated_delta": said}
    assert [record.getMessage() for record in caplog.records] == [f"kernel gated_delta: {said}"]
    forget_kernels()


def test_fla_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="backend 'fla' cannot run here: the tensors are on cpu, not on a GPU"):
        gated_delta(*gated_delta_inputs(1, 4, 1, 8), backend="fla")

    class OnGpu:
        is_cuda, shape, device = True, (1, 4, 1, 320), torch.device("cuda")

    half = torch.bfloat16
    assert why_not_applicable(OnGpu(), 64, half) == "fla's kernels take heads up to 256, not K=64, V=320"
    assert why_not_applicable(OnGpu(), 64, torch.float32).startswith("the inputs are float32, which fla would multiply")
    OnGpu.shape = (1, 4, 1, 64)
    monkeypatch.setattr(fla_op, "is_hopper", lambda device: True)
    for release, refused in (((3, 3, 1), False), ((3, 4, 0), True), ((3, 7, 0), True), ((3, 7, 1), False)):
        monkeypatch.setattr(fla_op, "_triton_release", lambda release=release: release)
        assert ("wrongly on Hopper" in (why_not_applicable(OnGpu(), 64, half) or "")) == refused
    monkeypatch.setattr(backends, "installed", lambda package: package != "fla")
    assert api.FORMS.why_not_gpu(OnGpu(), 64, half) == "fla is not installed"


@pytest.mark.parametrize("with_fla", [False, True])
def test_the_meta_device_counts_what_is_kept(monkeypatch, with_fla):
    monkeypatch.setattr("radlads.kernels.gated_delta.meta.installed", lambda package: with_fla)
    B, T, H, K, V = 2, 100, 3, 16, 24
    inputs = [x.detach().to("meta", torch.bfloat16).requires_grad_() for x in gated_delta_inputs(B, T, H, K, V)]
    kept = {}

    def pack(x):
        kept[id(x.untyped_storage())] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, state = gated_delta(*inputs, output_final_state=True)
    assert out.shape == (B, T, H, V)
    assert out.is_meta
    assert state.shape == (B, H, K, V)
    assert state.dtype == torch.float32
    given = sum(x.numel() for x in inputs) * 2
    tiles = B * 2 * H
    own = tiles * 64 * 64 * 2 + B * T * H * 4 if with_fla else tiles * (K + 64) * V * 4
    assert sum(x.numel() * x.element_size() for x in kept.values()) == given + own


BOUNDARIES = {
    "one": [0, 150],
    "ragged": [0, 1, 3, 35, 101, 150],
    "empty ones": [0, 0, 33, 33, 33, 98, 150, 150],
    "chunk edges": [0, 64, 128, 150],
    "single tokens": [0, 1, 2, 3, 150],
}


def why_not_fla() -> str | None:
    """Why fla's kernels do not run here; None if they do."""
    if not torch.cuda.is_available():
        return "needs a CUDA or ROCm device"
    v = torch.empty(1, 64, 1, 64, dtype=torch.bfloat16, device="cuda")
    return api.FORMS.why_not_gpu(v, 64, v.dtype)


gpu_forms = pytest.mark.parametrize(
    "backend",
    ["chunked", pytest.param("fla", marks=pytest.mark.skipif(why_not_fla() is not None, reason=str(why_not_fla())))],
)


@pytest.mark.gpu
@gpu_forms
@pytest.mark.parametrize("T", [1, 63, 65, 200, 1000])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_on_the_gpu(backend, size, T):
    """bf16 as mixers give it: gates in fp32. fla rounds what goes between its kernels: the bounds of its own tests."""
    inputs = gated_delta_inputs(2, T, 4, size, dtype=torch.bfloat16, device="cuda")
    inputs[3:] = [x.detach().float().requires_grad_() for x in inputs[3:]]
    state = state_like(2, 4, size, size, device="cuda")
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(exact_inputs, state.detach().double().requires_grad_(), backend="chunked")
    loose = {"d beta": 2e-2, "d log_decay": 2e-2} if backend == "fla" else {}
    for name, found in run(inputs, state, backend=backend).items():
        assert relative_rms(found, exact[name]) <= loose.get(name, 8e-3 if backend == "fla" else 4e-3), name


@pytest.mark.gpu
@gpu_forms
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -5.0, -1000.0, float("-inf")])
def test_any_decay_on_the_gpu(backend, log_decay):
    inputs = gated_delta_inputs(1, 200, 2, 64, dtype=torch.bfloat16, device="cuda", log_decay=log_decay)
    exact = run([x.detach().double().requires_grad_() for x in inputs], backend="chunked")
    for name, found in run(inputs, backend=backend).items():
        assert found.isfinite().all(), name
        if name != "d log_decay" or log_decay >= -5:
            assert relative_rms(found, exact[name]) <= 2e-2, name


@pytest.mark.gpu
@gpu_forms
@pytest.mark.parametrize("bounds", BOUNDARIES.values(), ids=BOUNDARIES.keys())
def test_packed_on_the_gpu(backend, bounds):
    inputs = gated_delta_inputs(1, 150, 2, 64, dtype=torch.bfloat16, device="cuda")
    cu_seqlens, found = torch.tensor(bounds, device="cuda"), {}
    state = state_like(len(bounds) - 1, 2, 64, 64, device="cuda")
    packed = run(inputs, state, backend=backend, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        for n, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                given = [x[:, start:stop].double() for x in inputs]
                found[n] = gated_delta(
                    *given, initial_state=state[n : n + 1].double(), output_final_state=True, backend="chunked"
                )
                assert relative_rms(packed["out"][:, start:stop], found[n][0]) <= 1e-2
                assert relative_rms(packed["state"][n : n + 1], found[n][1]) <= 1e-2
            else:
                torch.testing.assert_close(packed["state"][n], state[n].detach())
    assert all(x.isfinite().all() for x in packed.values())


@pytest.mark.gpu
@gpu_forms
def test_rules_of_autograd_on_the_gpu(backend):
    inputs = gated_delta_inputs(1, 200, 2, 64, dtype=torch.bfloat16, device="cuda")
    assert_autograd_rules(partial(gated_delta, output_final_state=True, backend=backend), inputs)


@pytest.mark.gpu
def test_a_gpu_takes_fla_where_it_is_installed():
    forget_kernels()
    gated_delta(*gated_delta_inputs(1, 70, 2, 64, dtype=torch.bfloat16, device="cuda"))
    why_not = why_not_fla()
    expected = "fla-core" if why_not is None else f"chunked (plain torch) ({why_not})"
    assert chosen_kernels()["gated_delta"].startswith(expected)
    forget_kernels()
