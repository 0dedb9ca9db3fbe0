"""Which backend runs a call. Triton is imported only when used: a machine without it still has the torch forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from radlads.kernels.meta import wkv6_meta
from radlads.kernels.wkv6.chunked import wkv6_chunked
from radlads.kernels.wkv6.reference import wkv6_reference

BACKENDS = ("reference", "chunked", "triton")


def choose_operator(backend: str | None, v: Tensor, K: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function behind `backend`; None: Triton on a GPU where it applies, else chunked. Raises ValueError."""
    if v.is_meta:
        return wkv6_meta
    if backend is None:
        backend = "triton" if v.is_cuda and why_not_triton(v, K) is None else "chunked"
    if backend == "reference":
        return wkv6_reference
    if backend == "chunked":
        return wkv6_chunked
    if backend != "triton":
        raise ValueError(f"wkv6: unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    reason = why_not_triton(v, K)
    if reason is not None:
        raise ValueError(f"wkv6: backend 'triton' cannot run here: {reason}")
    from radlads.kernels.wkv6.triton_op import wkv6_triton

    return wkv6_triton


def why_not_triton(v: Tensor, K: int) -> str | None:
    """One line on why these tensors cannot go through the Triton kernels; None if they can."""
    if not _triton_installed():
        return "triton is not installed"
    from radlads.kernels.wkv6.triton_op import why_not_applicable

    return why_not_applicable(v, K)


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None
