"""Where the time of a training step goes: torch's profiler over some steps, by kernel and by part of the step.

Parts are ranges around modules (mixer, MLP, norm, ...), opened only while the profiler runs. A kernel of the backward
pass belongs to the part whose forward operation had its number.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.profiler import record_function

from radlads.model.mixers.shared import recurrence_wkv7
from radlads.model.mixers.shared.mixer import Mixer

PREFIX = "part: "
_BACKWARD = "autograd::engine::evaluate_function: "
_GEMM = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|_mm_|aten::(add)?b?mm$", re.IGNORECASE)
_SOFTMAX_ATTENTION = re.compile(r"flash|fmha|cudnn.*sdpa|scaled_dot_product|mem_eff", re.IGNORECASE)
_COMMUNICATION = re.compile(r"nccl|gloo|c10d::", re.IGNORECASE)
_LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"}
_SYNCS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense"}
_TOP = 45


def part_of(name: str, module: nn.Module) -> str | None:
    """The part of a step that a module belongs to; None: no part, or several."""
    last, kind = name.rpartition(".")[2], type(module).__name__
    if isinstance(module, Mixer) or kind == "PlainMixer":
        return "mixer"
    if last == "self_attn":
        return "attention"
    if last == "mlp":
        return "mlp"
    if kind.endswith("RMSNorm") and ".self_attn." not in name:
        return "norm"
    return {"embed_tokens": "embeddings", "lm_head": "head", "rotary_emb": "rotary"}.get(last)


def group_of(name: str, part: str) -> str:
    """The group of a kernel of this name in a part of the step."""
    where = part.rpartition(" ")[2]
    if _COMMUNICATION.search(name):
        return "communication"
    if where in ("optimizer", "loss", "wkv7"):
        return where
    if _SOFTMAX_ATTENTION.search(name):
        return "softmax attention"
    if _GEMM.search(name):
        return "gemm"
    if where in ("mixer", "mlp", "norm", "attention"):
        return where if where == "norm" else f"{where}, elementwise"
    return "other"


class Profile:
    """A profiler over the last steps of a run. `begin`, then steps inside `engine`, then `end`."""

    def __init__(self, device: torch.device, steps: int, *, keep: bool) -> None:
        self.device, self.steps, self.keep = device, steps, keep
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._open = ExitStack()

    def begin(self, *, student: nn.Module, teacher: nn.Module | None, objective: nn.Module) -> None:
        """Open the parts and start."""
        for whose, model in (("teacher", teacher), ("student", student)):
            for name, module in () if model is None else model.named_modules():
                part = part_of(name, module)
                if part is not None:
                    self._wrap(module, "mix" if isinstance(module, Mixer) else "forward", f"{whose} {part}")
                if hasattr(module, "operator"):
                    self.around(module, "operator", "wkv7")
        self._wrap(objective, "forward", "loss")
        self.around(recurrence_wkv7, "wkv7", "wkv7")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._profiler.start()

    def around(self, owner: Any, name: str, part: str) -> None:
        """Make a function of a module or an object a part until the end."""
        self._open.enter_context(mock.patch.object(owner, name, _ranged(getattr(owner, name), part)))

    @contextmanager
    def engine(self, engine: Any) -> Iterator[None]:
        """Parts of a step of the product's engine."""
        parts = {"_move": "optimizer", "_between": "optimizer", "_agree": "optimizer", "_scale": "optimizer"}
        with ExitStack() as stack:
            for name, part in {**parts, "_backward": "gradients"}.items():
                stack.enter_context(mock.patch.object(engine, name, _ranged(getattr(engine, name), part)))
            yield

    def end(self) -> dict[str, Any] | None:
        """The tables, all of one step: {groups, kernels, parts: ms; launches, syncs, idle, span_ms}."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._profiler.stop()
        self._open.close()
        return summarise(self._profiler.events(), self.steps, self.device) if self.keep else None

    def _wrap(self, module: nn.Module, method: str, part: str) -> None:
        original = getattr(module, method)
        setattr(module, method, _ranged(original, part))
        self._open.callback(delattr, module, method)


def _ranged(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    return run


def summarise(events: Any, steps: int, device: torch.device) -> dict[str, Any]:
    """Tables of a profiler's events; milliseconds, counts and launches are of one step."""
    on_gpu = device.type == "cuda"
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    forward = _forward_parts(host)
    annotations = {event.name for event in host if event.is_user_annotation or event.name.startswith(PREFIX)}
    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    by_group: Counter[str] = Counter()
    by_part: dict[str, Counter[str]] = defaultdict(Counter)
    found = 0.0
    for event in host:
        pieces = [(kernel.name, kernel.duration) for kernel in event.kernels] if on_gpu else _on_host(event)
        if not pieces:
            continue
        part = _part(event, forward) or "other"
        for name, microseconds in pieces:
            if name in annotations:
                continue
            ms = microseconds / 1e3 / steps
            found += ms
            by_kernel[name][0] += ms
            by_kernel[name][1] += 1 / steps
            group = group_of(name, part)
            by_group[group] += ms
            by_part[part][group] += ms
    names = Counter(event.name for event in host)
    if on_gpu:
        everything = sum(event.time_range.elapsed_us() for event in _on_device(events)) / 1e3 / steps
        by_group["not attributed"] = max(0.0, everything - found)
        found = everything
    table = {
        "groups": dict(by_group.most_common()),
        "parts": {part: dict(groups.most_common()) for part, groups in sorted(by_part.items())},
        "kernels": sorted(([name, *numbers] for name, numbers in by_kernel.items()), key=lambda row: -row[1])[:_TOP],
        "launches": sum(names[name] for name in _LAUNCHES) / steps,
        "syncs": {name: names[name] / steps for name in sorted(_SYNCS) if names[name]},
        "busy_ms": found,
    }
    return table | (_idle(events, steps) if on_gpu else {})


def _on_host(event: Any) -> list[tuple[str, float]]:
    """Without a GPU: the time of an operator itself."""
    return [(event.name, event.self_cpu_time_total)] if event.name.startswith("aten::") else []


def _on_device(events: Any) -> list[Any]:
    """Whether an event is a kernel, copy or fill; user ranges appear among them and are excluded."""
    kind = torch.autograd.DeviceType.CUDA
    ranges = {event.name for event in events if event.is_user_annotation}
    return [event for event in events if event.device_type == kind and event.name not in ranges]


def _idle(events: Any, steps: int) -> dict[str, float]:
    """Share of the time between a GPU's first and last kernel without a running kernel."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in _on_device(events))
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    span = until - spans[0][0]
    return {"idle": 1 - busy / span, "span_ms": span / 1e3 / steps}


def _forward_parts(host: list[Any]) -> dict[tuple[int, int], str]:
    """(thread, number) of every forward operation that has a backward one → its part."""
    parts: dict[tuple[int, int], str] = {}
    for event in host:
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            part = _range_above(event)
            if part is not None:
                parts.setdefault((event.thread, event.sequence_nr), part)
    return parts


def _part(event: Any, forward: dict[tuple[int, int], str]) -> str | None:
    """The innermost part around an operation, or around the forward operation that it is the gradient of."""
    at = event
    while at is not None:
        if at.name.startswith(PREFIX):
            return at.name.removeprefix(PREFIX)
        if at.name.startswith(_BACKWARD):
            if "AccumulateGrad" in at.name:
                return "gradients"
            known = forward.get((at.fwd_thread, at.sequence_nr))
            if known is not None:
                return f"backward of {known}"
        at = at.cpu_parent
    return None


def _range_above(event: Any) -> str | None:
    at = event
    while at is not None:
        if at.name.startswith(PREFIX):
            return at.name.removeprefix(PREFIX)
        if at.name.startswith(_BACKWARD):
            return None
        at = at.cpu_parent
    return None
