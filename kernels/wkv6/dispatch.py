"""Which backend runs a call. Triton is imported only when used: a machine without it still has the torch forms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from radlads.kernels.meta import wkv6_meta
from radlads.kernels.wkv6.chunked import wkv6_chunked
from radlads.kernels.wkv6.reference import wkv6_reference

BACKENDS = ("reference", "chunked")


def choose_operator(backend: str | None, v: Tensor, K: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function behind `backend`; None: the fastest that applies. Raises ValueError."""
    if v.is_meta:
        return wkv6_meta
    if backend is None:
        backend = "chunked"
    if backend == "reference":
        return wkv6_reference
    if backend == "chunked":
        return wkv6_chunked
    raise ValueError(f"wkv6: unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
