"""Choice of the form of a recurrence for a call. GPU packages are imported only when used, so that the other forms
run without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radlads.kernels.shared.check import check_bounds, check_inputs
from radlads.kernels.shared.chosen import note_kernel
from radlads.kernels.shared.opaque import opaque_operator

Operator = Callable[..., tuple[Tensor, Tensor | None]]


class GpuForm(NamedTuple):
    """The form of an operator for GPUs."""

    operator: Operator
    why_not_applicable: Callable[[Tensor, int, torch.dtype], str | None]
    """v, K, dtype of products → one line on why these tensors cannot go through it; None if they can."""


@dataclass(frozen=True)
class Forms:
    """The forms of one operator."""

    name: str
    reference: Operator
    chunked: Operator
    meta: Operator
    on_gpu: Callable[[], GpuForm]
    """Imports the form for GPUs, which needs the package `gpu`."""
    inputs: tuple[str, ...]
    """Their names, in order."""
    gpu: str = "triton"
    gates: tuple[str, ...] = ()
    """Those of them that are numbers of a token and head, [B,T,H]."""
    node: Any = field(init=False)
    """The operator for torch.compile."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "node", opaque_operator(self.name, self._run_in_order, self.inputs.index("v")))

    @property
    def backends(self) -> tuple[str, ...]:
        """Allowed values of `backend`."""
        return ("reference", "chunked", self.gpu)

    def choose(self, backend: str | None, v: Tensor, K: int, dtype: torch.dtype) -> Operator:
        """The form for `backend`; None: the GPU form on a GPU where it applies, else chunked. Raises ValueError.

        dtype: the dtype of products of r, k, v and the like (`common_dtype`).
        """
        if v.is_meta:
            return self.meta
        if backend is not None and backend not in self.backends:
            raise ValueError(f"{self.name}: unknown backend {backend!r}; choose from {', '.join(self.backends)}")
        reason = None if backend in ("reference", "chunked") else self.why_not_gpu(v, K, dtype)
        if backend == self.gpu and reason is not None:
            raise ValueError(f"{self.name}: backend '{self.gpu}' cannot run here: {reason}")
        if backend == self.gpu or (backend is None and v.is_cuda and reason is None):
            return self.on_gpu().operator  # records the kernel that it uses itself
        slow = backend is None and v.is_cuda
        note_kernel(self.name, f"{backend or 'chunked'} (plain torch)", lambda: reason or "requested", slow=slow)
        return self.reference if backend == "reference" else self.chunked

    def run(
        self,
        inputs: Mapping[str, Tensor],
        backend: str | None,
        cu_seqlens: Tensor | None,
        **states: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Check a call and run it. inputs: by name, in the operator's order. states: initial_state and
        output_final_state. Raises ValueError: see `choose`, `check_inputs`, `check_bounds`.
        """
        if torch.compiler.is_compiling() and backend is None:
            return self._traced(inputs, cu_seqlens, states)
        v = inputs["v"]
        keys = {name: x for name, x in inputs.items() if name != "v" and name not in self.gates}
        numbers = {name: inputs[name] for name in self.gates}
        check_inputs(self.name, keys, v, states["initial_state"], cu_seqlens, numbers)
        dtype = common_dtype(v, *(x for name, x in keys.items() if name != "log_decay"))
        operator = self.choose(backend, v, inputs["k"].shape[-1], dtype)
        if cu_seqlens is not None and not cu_seqlens.is_cuda:  # on a GPU, reading them would wait for it
            check_bounds(self.name, cu_seqlens, v.shape[1])
        return operator(*inputs.values(), cu_seqlens=cu_seqlens, **states)

    def _run_in_order(self, *inputs: Tensor, cu_seqlens: Tensor | None, **states: Any) -> tuple[Tensor, Tensor | None]:
        return self.run(dict(zip(self.inputs, inputs, strict=True)), None, cu_seqlens, **states)

    def _traced(
        self, inputs: Mapping[str, Tensor], cu_seqlens: Tensor | None, states: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """As `run` while torch.compile traces: one node, or a break in the graph where there are gradients."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs.values()):
            return _untraced(self, inputs, cu_seqlens, states)
        wanted = states["output_final_state"]
        out, state = self.node(list(inputs.values()), states["initial_state"], wanted, cu_seqlens)
        return out, state if wanted else None

    def why_not_gpu(self, v: Tensor, K: int, dtype: torch.dtype) -> str | None:
        """One line on why these tensors cannot go through the GPU's kernels; None if they can."""
        if not installed(self.gpu):
            return f"{self.gpu} is not installed" if v.is_cuda else not_on_gpu(v)
        return self.on_gpu().why_not_applicable(v, K, dtype)


@torch.compiler.disable
def _untraced(forms: Forms, inputs: Mapping[str, Tensor], cu_seqlens: Tensor | None, states: Any) -> Any:
    """With gradients: torch.compile leaves its graph here."""
    return forms.run(inputs, None, cu_seqlens, **states)


def not_on_gpu(x: Tensor) -> str:
    """Why a kernel for GPUs cannot take a tensor on another device."""
    return f"the tensors are on {x.device.type}, not on a GPU"


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The common dtype of all tensors; fp32 if they differ."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def is_hopper(device: torch.device | None = None) -> bool:
    """Whether this GPU (None: the current one) is of NVIDIA's Hopper generation."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def triton_installed() -> bool:
    return installed("triton")
