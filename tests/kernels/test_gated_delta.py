"""gated_delta: against the recurrence in fp64, never worse than twice the loop in the same dtype; fla's on a GPU."""

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
    assert_autograd_rules,
    outputs_and_gradients,
    poisoned_memory,
    relative_rms,
)
from radlads.kernels.wkv7 import wkv7

NAMES = ("q", "k", "v", "log_decay", "beta")
# A chunk sums up to 64 products where the loop adds one at a time.
TINY = {torch.float64: 1e-14, torch.float32: 4e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
run = partial(outputs_and_gradients, gated_delta, names=NAMES)


def gated_delta_inputs(
    B, T, H, K, V=None, *, dtype=torch.float32, device="cpu", seed=0, log_decay=None, beta=None, period=None
):
    """The five inputs as the mixer makes them, requiring gradients; drawn in fp64, the same for every dtype.

    Unit q and k; half of the heads forget fast. log_decay, beta: fixed; period: that many distinct keys, repeated.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    v, speed, rate = normal(B, T, H, V or K), normal(B, T, H), normal(B, T, H)
    speed = -torch.nn.functional.softplus(speed + torch.linspace(-5, 1, H, dtype=torch.float64, device=device))
    if period is not None:
        k = k[:, torch.arange(T, device=device) % period]
    speed = speed if log_decay is None else torch.full_like(speed, log_decay)
    rate = rate.sigmoid() if beta is None else torch.full_like(rate, beta)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, speed, rate)]


def state_like(N, H, K, V, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    state = torch.randn(N, H, K, V, generator=generator, dtype=torch.float64).mul(0.3)
    return state.to(device, dtype).requires_grad_()


def assert_as_good_as_the_loop(inputs, initial_state=None, *, backend="chunked", factor=2.0, **options):
    """error(backend) <= factor · error(loop, same dtype) + tiny, both against the loop in fp64."""
    exact_state = None if initial_state is None else initial_state.detach().double().requires_grad_()
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = run(exact_inputs, exact_state, backend="reference", **options)
    loop = run(inputs, initial_state, backend="reference", **options)
    with poisoned_memory():
        ours = run(inputs, initial_state, backend=backend, **options)
    dtype = inputs[2].dtype
    assert all(torch.equal(x.double(), y) for x, y in zip(inputs, exact_inputs, strict=True)), "inputs were written to"
    for name, reference in exact.items():
        assert ours[name].dtype == loop[name].dtype, name
        allowed = factor * relative_rms(loop[name], reference) + TINY[dtype]
        error = relative_rms(ours[name], reference)
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 16, 63, 64, 65, 200])
def test_output_state_and_gradients(T, dtype):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert_as_good_as_the_loop(gated_delta_inputs(2, T, 2, 16, 24, dtype=dtype), state_like(2, 2, 16, 24, state_dtype))


@pytest.mark.parametrize(("K", "V"), [(8, 8), (64, 64), (96, 40), (1, 3)])
def test_head_sizes(K, V):
    assert_as_good_as_the_loop(gated_delta_inputs(1, 70, 2, K, V))


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -0.1, -5.0, -40.0, -1000.0, -1e5, 0.05])
def test_any_decay(log_decay):
    assert_as_good_as_the_loop(gated_delta_inputs(1, 70, 2, 8, log_decay=log_decay), state_like(1, 2, 8, 8))


def test_strong_decays_beside_weak_ones():
    """The cumulative log decay of a chunk reaches 2,000, and the differences of weak tokens must survive that."""
    inputs = gated_delta_inputs(1, 130, 2, 16, log_decay=-1e-3)
    with torch.no_grad():
        inputs[3][:, ::2] = -60.0
        inputs[3][:, 65::7] = -0.5
    assert_as_good_as_the_loop(inputs, state_like(1, 2, 16, 16))


def test_a_hard_reset_inside_a_chunk():
    inputs = gated_delta_inputs(1, 100, 1, 8)
    with torch.no_grad():
        inputs[3][:, [20, 21, 70]] = float("-inf")
    out, state = gated_delta(*inputs, output_final_state=True)
    expected, expected_state = gated_delta(*inputs, output_final_state=True, backend="reference")
    assert relative_rms(out, expected) < 1e-6
    assert relative_rms(state, expected_state) < 1e-6
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.9])
@pytest.mark.parametrize("period", [1, 3])
def test_one_key_over_and_over(period, beta):
    """Padding, "aaaa": powers of the triangle would grow like binomials before they cancel. Beyond 1
    writes overshoot and errors swing: 1e-5 in the gradient of the decay, the loop's 1e-6. No mixer goes there."""
    inputs = gated_delta_inputs(1, 130, 2, 16, log_decay=-1e-3, beta=beta, period=period)
    assert_as_good_as_the_loop(inputs, state_like(1, 2, 16, 16), factor=2.0 if beta <= 1 else 8.0)


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

    expected = outputs_and_gradients(operator, inputs, state, names=NAMES)
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


BOUNDARIES = {
    "one": [0, 150],
    "ragged": [0, 1, 3, 35, 101, 150],
    "empty ones": [0, 0, 33, 33, 33, 98, 150, 150],
    "chunk edges": [0, 64, 128, 150],
    "single tokens": [0, 1, 2, 3, 150],
}


@pytest.mark.parametrize("bounds", BOUNDARIES.values(), ids=BOUNDARIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences(bounds, dtype):
    state = state_like(len(bounds) - 1, 2, 8, 12)
    assert_as_good_as_the_loop(
        gated_delta_inputs(1, 150, 2, 8, 12, dtype=dtype), state, cu_seqlens=torch.tensor(bounds)
    )


def test_packed_equals_dense():
    inputs = gated_delta_inputs(3, 70, 2, 16)
    dense = run(inputs, backend="chunked")
    packed = [x.detach().reshape(1, -1, *x.shape[2:]).requires_grad_() for x in inputs]
    other = run(packed, cu_seqlens=torch.tensor([0, 70, 140, 210], dtype=torch.int32))
    for name, x in dense.items():
        torch.testing.assert_close(other[name].reshape(x.shape), x, rtol=1e-5, atol=1e-5)


def test_sequences_do_not_leak_not_even_nan():
    inputs = [x.detach() for x in gated_delta_inputs(1, 100, 1, 8)]
    for x in inputs:
        x[:, :20] = float("nan")
    out, state = gated_delta(*inputs, cu_seqlens=torch.tensor([0, 20, 100]), output_final_state=True)
    assert out[:, 20:].isfinite().all()
    assert state[1].isfinite().all()


@pytest.mark.parametrize("cut", [1, 64, 89])
def test_split_anywhere_and_pass_the_state(cut):
    inputs = [x.detach() for x in gated_delta_inputs(2, 100, 2, 8)]
    out, state = gated_delta(*inputs, output_final_state=True)
    first, carried = gated_delta(*(x[:, :cut] for x in inputs), output_final_state=True)
    second, last = gated_delta(*(x[:, cut:] for x in inputs), initial_state=carried, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


def test_tokens_without_decay_and_rate_are_passed_over():
    """How padding is told: log decay and beta of zero leave the state as it was."""
    inputs = [x.detach() for x in gated_delta_inputs(1, 100, 2, 8)]
    for x in inputs[3:]:
        x[:, :40] = 0
    _, state = gated_delta(*inputs, output_final_state=True)
    _, expected = gated_delta(*(x[:, 40:] for x in inputs), output_final_state=True)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


def test_step_equals_prefill():
    inputs = [x.detach() for x in gated_delta_inputs(2, 80, 3, 16, 24)]
    out, state = gated_delta(*inputs, output_final_state=True)
    running = torch.zeros(2, 3, 16, 24)
    storage = running.data_ptr()
    stepped = torch.stack([gated_delta_step(*(x[:, t] for x in inputs), running) for t in range(80)], 1)
    assert running.data_ptr() == storage
    torch.testing.assert_close(stepped, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running, state, rtol=1e-5, atol=1e-5)


def test_step_on_a_strided_state_and_low_precision_inputs():
    inputs = [x.detach()[:, 0] for x in gated_delta_inputs(2, 1, 3, 8, dtype=torch.bfloat16)]
    cache = torch.randn(4, 3, 8, 8)
    expected = cache.clone()
    rows = cache[::2]
    out = gated_delta_step(*inputs, rows)
    reference, state = gated_delta(
        *(x[:, None] for x in inputs), initial_state=expected[::2], output_final_state=True, backend="reference"
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, reference[:, 0])
    torch.testing.assert_close(rows, state)
    torch.testing.assert_close(cache[1::2], expected[1::2])


def test_inputs_need_not_be_contiguous():
    inputs = gated_delta_inputs(2, 70, 2, 8)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    strided[1] = inputs[1].detach()[:, :, :1].expand(-1, -1, 2, -1).requires_grad_()
    inputs[1] = strided[1].detach().clone().requires_grad_()
    whole, other = run(inputs), run(strided)
    for name in whole:
        torch.testing.assert_close(other[name], whole[name])


@pytest.mark.parametrize("T", [5, 70])
def test_gradient_check(T):
    """Of all gradients at once for 70 tokens, over a chunk's edge: fast mode probes random directions."""
    inputs = gated_delta_inputs(1, T, 1, 3, 2, dtype=torch.float64)
    state = state_like(1, 1, 3, 2, torch.float64)

    def operator(*args):
        return gated_delta(*args[:5], initial_state=args[5], output_final_state=True)

    assert torch.autograd.gradcheck(operator, (*inputs, state), fast_mode=T > 5)


@pytest.mark.parametrize(
    "options", [{"output_final_state": True}, {"cu_seqlens": torch.tensor([0, 3, 3, 17, 70])}], ids=str
)
def test_rules_of_autograd(options):
    assert_autograd_rules(partial(gated_delta, **options), gated_delta_inputs(1, 70, 2, 16))


def test_any_default_device():
    """Tensors go where the inputs are, whatever torch's default device is: with `meta`, one made there shows."""
    inputs = gated_delta_inputs(1, 70, 2, 16)
    expected = run(inputs)
    with torch.device("meta"):
        out, _ = gated_delta(*inputs, cu_seqlens=torch.tensor([0, 30, 70], device="cpu"))
        gradients = torch.autograd.grad(out.sum(), inputs)
        step = gated_delta_step(*(x.detach()[:, 0] for x in inputs), torch.zeros(1, 2, 16, 16, device="cpu"))
    assert {x.device.type for x in (out, step, *gradients)} == {"cpu"}
    torch.testing.assert_close(step, expected["out"][:, 0])


def test_under_torch_compile():
    inputs = gated_delta_inputs(1, 70, 2, 16)
    torch.compiler.reset()
    expected, found = gated_delta(*inputs)[0], torch.compile(gated_delta, backend="eager")(*inputs)[0]
    gradients = [torch.autograd.grad(x.sum(), inputs) for x in (expected, found)]
    assert torch.equal(found, expected)
    assert all(map(torch.equal, *gradients))


def test_autocast_does_not_reach_inside():
    inputs = gated_delta_inputs(1, 70, 2, 16)
    out, _ = gated_delta(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, _ = gated_delta(*inputs)
    torch.testing.assert_close(other, out)


def test_no_final_state_unless_asked_and_frozen_inputs_get_no_gradient():
    inputs = gated_delta_inputs(1, 8, 1, 8)
    inputs[0] = inputs[0].detach()
    out, state = gated_delta(*inputs)
    assert state is None
    out.sum().backward()
    assert inputs[0].grad is None
    assert inputs[1].grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"q_BTHK": x[0][:, :-1]}, "gated_delta: q must have k's shape"),
        (lambda x: {"v_BTHV": x[2][:, :, :1]}, "gated_delta: v must be"),
        (lambda x: {"k_BTHK": x[1][0]}, "gated_delta: k and v must be"),
        (lambda x: {"beta_BTH": x[4][..., None]}, r"beta must be \[B,T,H\] \(2, 10, 2\), got \(2, 10, 2, 1\)"),
        (lambda x: {"log_decay_BTH": x[3].long()}, "log_decay must be bfloat16"),
        (lambda x: {"initial_state": torch.zeros(2, 2, 8, 9)}, "initial_state must be"),
        (lambda x: {"cu_seqlens": torch.tensor([0, 10])}, "batch must be 1"),
        (lambda x: {"backend": "triton"}, "unknown backend 'triton'; choose from reference, chunked, fla"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change, message):
    inputs = gated_delta_inputs(2, 10, 2, 8)
    names = ("q_BTHK", "k_BTHK", "v_BTHV", "log_decay_BTH", "beta_BTH")
    with pytest.raises(ValueError, match=message) as error:
        gated_delta(**(dict(zip(names, inputs, strict=True)) | change(inputs)))
    assert "\n" not in str(error.value)


def test_wrong_boundaries_are_refused():
    with pytest.raises(ValueError, match="gated_delta: cu_seqlens must start at 0"):
        gated_delta(*gated_delta_inputs(1, 10, 1, 8), cu_seqlens=torch.tensor([0, 7, 5, 10]))


def test_step_refuses_what_does_not_fit():
    inputs = [x[:, 0] for x in gated_delta_inputs(1, 1, 2, 8)]
    with pytest.raises(ValueError, match="gated_delta_step: v must be"):
        gated_delta_step(*inputs, torch.zeros(1, 2, 8, 16))
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
