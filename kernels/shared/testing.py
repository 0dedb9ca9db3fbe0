"""What tests, benchmarks and self-tests of kernels share: inputs like RWKV-7's, an error measure, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DECAY_FLOOR = -0.6065306597126334  # -exp(-1/2): RWKV-7's log decay lies in (DECAY_FLOOR, 0)
INPUT_NAMES = ("r", "log_decay", "k", "v", "a", "b")
WKV6_NAMES = INPUT_NAMES[:4]
GATED_DELTA_NAMES = ("q", "k", "v", "log_decay", "beta")
WKV6_FLOOR = -5.0  # RAD-RWKV6's log decay lies in [WKV6_FLOOR, 0)


def _normal(seed: int, device: str) -> Callable[..., Tensor]:
    """shape -> normal numbers of it in fp64, from one generator."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return partial(torch.randn, generator=generator, dtype=torch.float64, device=device)


def wkv7_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    log_decay: float | None = None,
    period: int | None = None,
    iclr: float | None = None,
) -> list[Tensor]:
    """The six inputs [B,T,H,K] as RWKV-7 makes them, requiring gradients; drawn in fp64, the same for every dtype.

    `log_decay` fixes the decay; `period` repeats that many distinct removal keys over and over, with k along them (what
    padding or "aaaa" does to a model); `iclr` fixes the learning rate.
    """
    normal = partial(_normal(seed, device), B, T, H)
    r, w, k, v, kk, rate = normal(K), normal(K), normal(K) * K**-0.5, normal(V or K), normal(K), normal(K)
    kk = torch.nn.functional.normalize(kk, dim=-1)
    w = DECAY_FLOOR * torch.sigmoid(2 * w) if log_decay is None else torch.full_like(w, log_decay)
    rate = torch.sigmoid(rate) if iclr is None else torch.full_like(rate, iclr)
    if period is not None:
        kk = kk[:, torch.arange(T, device=device) % period]
        k = kk * 4 * K**-0.5
    return [x.to(dtype).requires_grad_() for x in (r, w, k, v, -kk, kk * rate)]


def wkv6_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    log_decay: float | None = None,
) -> list[Tensor]:
    """The four inputs [B,T,H,K] as RAD-RWKV6 makes them, requiring gradients; drawn in fp64, the same for every dtype.

    Log decays spread from the floor, where a fifth of them lies, to nearly none, and keys are scaled by 1 - decay;
    `log_decay` fixes the decay and leaves the keys as they are.
    """
    normal = partial(_normal(seed, device), B, T, H)
    r, w, k, v = normal(K) * K**-0.5, normal(K), normal(K), normal(V or K)
    w = (-(2.5 * w - 0.5).exp()).clamp(min=WKV6_FLOOR) if log_decay is None else torch.full_like(w, log_decay)
    k = k * -w.expm1() if log_decay is None else k
    return [x.to(dtype).requires_grad_() for x in (r, w, k, v)]


def gated_delta_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    log_decay: float | None = None,
    beta: float | None = None,
    period: int | None = None,
) -> list[Tensor]:
    """The five inputs as the mixer makes them, requiring gradients; drawn in fp64, the same for every dtype.

    Unit q and k; half of the heads forget fast. log_decay, beta: fixed; period: that many distinct keys, repeated.
    """
    normal = partial(_normal(seed, device), B, T, H)
    q, k = (torch.nn.functional.normalize(normal(K), dim=-1) for _ in range(2))
    v, speed, rate = normal(V or K), normal(), normal()
    speed = -torch.nn.functional.softplus(speed + torch.linspace(-5, 1, H, dtype=torch.float64, device=device))
    if period is not None:
        k = k[:, torch.arange(T, device=device) % period]
    speed = speed if log_decay is None else torch.full_like(speed, log_decay)
    rate = rate.sigmoid() if beta is None else torch.full_like(rate, beta)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, speed, rate)]


def state_like(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 7) -> Tensor:
    """An initial state [N,H,K,V] that requires a gradient; drawn in fp64, the same for every dtype."""
    state = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(0.3)
    return state.to(device, dtype).requires_grad_()


def relative_rms(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference| in the 2-norm, in fp64; the plain norm of x where the reference is zero."""
    x, reference = x.detach().double(), reference.detach().double()
    size = reference.norm().item()
    return (x - reference).norm().item() / (size or 1.0)


def outputs_and_gradients(
    operator: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    initial_state: Tensor | None = None,
    *,
    seed: int = 1,
    names: Sequence[str] = INPUT_NAMES,
    **options: Any,
) -> dict[str, Tensor]:
    """`operator` forward and backward, upstream gradients fixed. names: of its inputs; wkv6 has the first of wkv7's.

    Returns {"out", "state", "d r", ..., "d initial_state"}.
    """
    leaves = inputs if initial_state is None else [*inputs, initial_state]
    out, state = operator(*inputs, initial_state=initial_state, output_final_state=True, **options)
    generator = torch.Generator(device=out.device).manual_seed(seed)

    def upstream(x: Tensor) -> Tensor:  # rounded once, so that every dtype sees the same values
        return torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype)

    grads = torch.autograd.grad((out, state), leaves, (upstream(out), upstream(state)))
    labels = [f"d {name}" for name in names[: len(inputs)]] + ["d initial_state"]
    return {"out": out, "state": state, **dict(zip(labels, grads, strict=False))}


def assert_as_good_as_the_loop(
    operator: Callable[..., tuple[Tensor, Tensor]],
    ours: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    initial_state: Tensor | None = None,
    *,
    tiny: float,
    decay_slack: float = 1.0,
    names: Sequence[str] = INPUT_NAMES,
    **options: Any,
) -> None:
    """error(ours) <= 2 error(the operator's loop, same dtype) + tiny, both against the loop in fp64; inputs are left
    as they are.

    decay_slack: on `tiny`, for the gradient of the log decay alone. Raises AssertionError.
    """
    exact_state = None if initial_state is None else initial_state.detach().double().requires_grad_()
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    loop = partial(outputs_and_gradients, operator, names=names, backend="reference", **options)
    exact, rounded = loop(exact_inputs, exact_state), loop(inputs, initial_state)
    with poisoned_memory():
        found = outputs_and_gradients(ours, inputs, initial_state, names=names, **options)
    assert all(torch.equal(x.double(), y) for x, y in zip(inputs, exact_inputs, strict=True)), "inputs were written to"
    for name, reference in exact.items():
        assert found[name].dtype == rounded[name].dtype, name
        slack = decay_slack if name == "d log_decay" else 1.0
        allowed = 2 * relative_rms(rounded[name], reference) + slack * tiny
        error = relative_rms(found[name], reference)
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


def assert_autograd_rules(operator: Callable[..., tuple[Tensor, Tensor | None]], inputs: list[Tensor]) -> None:
    """Uses of an autograd function in training code, each bit-equal to one plain backward pass.

    Non-reentrant activation checkpointing (twice nested too), a second backward pass over a retained graph, an output
    that the loss does not use, and an input that needs no gradient. `operator(*inputs)` gives (output, second output
    or None). Raises AssertionError.
    """

    def run(call: Callable[..., tuple[Tensor, Tensor | None]], used: int) -> list[list[Tensor]]:
        out = call(*inputs)[used]
        assert out is not None
        loss = (out.float() * torch.linspace(-1, 1, out.shape[-1] if out.dim() else 1, device=out.device)).sum()
        passes = [torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) for _ in range(2)]
        return [[torch.zeros_like(x) if g is None else g for g, x in zip(p, inputs, strict=True)] for p in passes]

    def checkpointed(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        return checkpoint(operator, *args, use_reentrant=False)

    def nested(*args: Tensor) -> tuple[Tensor, Tensor | None]:
        return checkpoint(checkpointed, *args, use_reentrant=False)

    num_outputs = 1 if operator(*inputs)[1] is None else 2
    for used in range(num_outputs):
        expected, again = run(operator, used)
        assert any(bool(g.any()) for g in expected), f"output {used}: no gradient at all"
        for name, found in (("a second backward pass", again), ("checkpointing", run(checkpointed, used)[0])):
            assert all(map(torch.equal, expected, found)), f"output {used}: {name} changes the gradient"
        assert all(map(torch.equal, expected, run(nested, used)[0])), f"output {used}: nested checkpointing differs"
    for index in range(len(inputs)):
        given = [x.detach() if i == index else x for i, x in enumerate(inputs)]
        others = [x for x in given if x.requires_grad]
        if others:
            torch.autograd.grad(operator(*given)[0].float().sum(), others)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context in which uninitialised floating tensors hold NaN, so that reads of unwritten memory become visible."""
    names = ("empty", "empty_like", "empty_strided")
    originals = {name: getattr(torch, name) for name in names}
    new_empty = Tensor.new_empty

    def poison(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def create_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            x = create(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return create_poisoned

    for name, original in originals.items():
        setattr(torch, name, poison(original))
    Tensor.new_empty = poison(new_empty)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
        Tensor.new_empty = new_empty  # type: ignore[method-assign]
