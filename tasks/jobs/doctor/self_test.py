"""The program of `radlads doctor` that needs torch: the devices, and each kernel against its reference.

`python -m radlads.tasks.jobs.doctor.self_test out.json`. An operator's fast form, with gradients, is compared with its
loop in fp64; it may be off by twice what the loop is in the same dtype, and a little.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radlads.kernels.gated_delta.api import gated_delta
from radlads.kernels.linear_kl.kl import linear_kl
from radlads.kernels.row_distance.api import squared_distance
from radlads.kernels.shared.chosen import chosen_kernels
from radlads.kernels.shared.testing import (
    GATED_DELTA_NAMES,
    INPUT_NAMES,
    WKV6_NAMES,
    gated_delta_inputs,
    outputs_and_gradients,
    relative_rms,
    state_like,
    wkv6_inputs,
    wkv7_inputs,
)
from radlads.kernels.window_attention.api import window_attention
from radlads.kernels.wkv6.api import wkv6
from radlads.kernels.wkv7.api import wkv7
from radlads.tasks.contracts.errors import error_text
from radlads.tasks.jobs.exit_reasons import write_json

_TINY = {torch.bfloat16: 8e-3, torch.float32: 1e-5}
_B, _T, _H, _K = 1, 70, 2, 64
Errors = dict[str, tuple[float, float]]
"""Name of an output or gradient → (error of the fast form, error of the reference in the same dtype)."""


def main() -> None:
    """Write what was found, as JSON."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if on_gpu else [],
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": [_judge(name, check, device, dtype) for name, check in _CHECKS.items()],
    }
    forms = chosen_kernels()
    for kernel in found["kernels"]:
        ran = forms.get(kernel["operator"], "").split("; ")
        kernel["form"] = "; ".join(form for form in ran if not form.startswith("reference") and "requested" not in form)
    write_json(Path(sys.argv[1]), found)


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "free_bytes": free, "total_bytes": total}


def _judge(name: str, check: Callable[[str, torch.dtype], Errors], device: str, dtype: torch.dtype) -> dict[str, Any]:
    try:
        errors = check(device, dtype)
    except Exception as fault:  # noqa: BLE001 - whatever a compiler or a driver raises is the finding
        return {"operator": name, "fault": f"{type(fault).__name__}: {error_text(fault)}"}
    excess = {what: found - 2 * baseline - _TINY[dtype] for what, (found, baseline) in errors.items()}
    worst = max(excess, key=lambda what: excess[what] if excess[what] == excess[what] else float("inf"))
    found, baseline = errors[worst]
    good = all(value <= 0 for value in excess.values())  # NaN is not
    return {"operator": name, "good": good, "worst": worst, "error": _finite(found), "baseline": _finite(baseline)}


def _sequence(operator: Any, inputs: Any, names: Any, device: str, dtype: torch.dtype) -> Errors:
    own = inputs(_B, _T, _H, _K, dtype=dtype, device=device)
    state = state_like(_B, _H, _K, _K, device=device)
    exact_inputs = [x.detach().double().requires_grad_() for x in own]
    exact_state = state.detach().double().requires_grad_()
    exact = outputs_and_gradients(operator, exact_inputs, exact_state, names=names, backend="reference")
    loop = outputs_and_gradients(operator, own, state, names=names, backend="reference")
    fast = outputs_and_gradients(operator, own, state, names=names)
    return {name: (relative_rms(fast[name], one), relative_rms(loop[name], one)) for name, one in exact.items()}


def _window(device: str, dtype: torch.dtype) -> Errors:
    q, k, v = (_normal(index, device, _B, _T, _H, _K) for index in range(3))
    options: dict[str, Any] = {"sinks": 2, "window": 48, "scale": _K**-0.5}

    def run(x: torch.dtype, backend: str) -> Tensor:
        out: Tensor = window_attention(q.to(x), k.to(x), v.to(x), backend=backend, **options)[0]  # type: ignore[arg-type]
        return out

    exact, loop, fast = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "chunked")
    return {"out": (relative_rms(fast, exact), relative_rms(loop, exact))}


def _divergence(device: str, dtype: torch.dtype) -> Errors:
    N, D, V = 96, 64, 1000
    ours, theirs = _normal(0, device, N, D), _normal(1, device, N, D)
    head, other = _normal(2, device, V, D) * 0.2, _normal(3, device, V, D) * 0.2

    def plain(x: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden = ours.to(x).requires_grad_()
        z, y = (hidden @ head.to(x).T).to(_wide(x)), (theirs.to(x) @ other.to(x).T).to(_wide(x))
        loss = torch.nn.functional.kl_div(z.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True)
        return loss, torch.autograd.grad(loss, hidden)[0]

    hidden = ours.to(dtype).requires_grad_()
    loss = linear_kl(hidden, head.to(dtype), theirs.to(dtype), other.to(dtype))[0]
    fast = (loss, torch.autograd.grad(loss, hidden)[0])
    names = ("loss", "d hidden")
    exact, same = plain(torch.float64), plain(dtype)
    return {n: (relative_rms(f, e), relative_rms(s, e)) for n, f, s, e in zip(names, fast, same, exact, strict=True)}


def _distance(device: str, dtype: torch.dtype) -> Errors:
    out, wanted = _normal(0, device, 2, 33, 96), _normal(1, device, 2, 33, 96)
    exact = squared_distance(out, wanted, backend="torch")
    same = squared_distance(out.to(dtype), wanted.to(dtype), backend="torch")
    fast = squared_distance(out.to(dtype), wanted.to(dtype))
    return {"out": (relative_rms(fast, exact), relative_rms(same, exact))}


def _normal(seed: int, device: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None


_CHECKS: dict[str, Callable[[str, torch.dtype], Errors]] = {
    "wkv7": lambda device, dtype: _sequence(wkv7, wkv7_inputs, INPUT_NAMES, device, dtype),
    "wkv6": lambda device, dtype: _sequence(wkv6, wkv6_inputs, WKV6_NAMES, device, dtype),
    "gated_delta": lambda device, dtype: _sequence(gated_delta, gated_delta_inputs, GATED_DELTA_NAMES, device, dtype),
    "window_attention": _window,
    "linear_kl": _divergence,
    "squared_distance": _distance,
}


if __name__ == "__main__":
    main()
