"""Checks of operators over sequences: a one-line error for wrong shapes, before any kernel reads out of bounds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_inputs(
    operator: str,
    keys: Mapping[str, Tensor],
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    gates: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Raise ValueError unless `keys` (all [B,T,H,K], "k" among them) and v [B,T,H,V] fit together and with the rest.

    `gates` are numbers of a token and head, [B,T,H]. `initial_state` is [B,H,K,V]; with `cu_seqlens` (int [N+1]) B is 1
    and the states are [N,H,K,V]. Looks at shapes, dtypes and devices only: no host synchronisation.
    """
    k = keys["k"]
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"{operator}: k and v must be [B,T,H,K] and [B,T,H,V], got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    B, T, H, K = k.shape
    V = v.shape[-1]
    for name, x in keys.items():
        if x.shape != k.shape:
            raise ValueError(f"{operator}: {name} must have k's shape {tuple(k.shape)}, got {tuple(x.shape)}")
    for name, x in gates.items():
        if x.shape != k.shape[:3]:
            raise ValueError(f"{operator}: {name} must be [B,T,H] {tuple(k.shape[:3])}, got {tuple(x.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{operator}: v must be [{B},{T},{H},V] like k {tuple(k.shape)}, got {tuple(v.shape)}")
    if min(B, T, H, K, V) < 1:
        raise ValueError(
            f"{operator}: every dimension must be at least 1, got k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    for name, x in {**keys, **gates, "v": v}.items():
        if x.dtype not in _DTYPES:
            raise ValueError(f"{operator}: {name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.device != v.device:
            raise ValueError(f"{operator}: {name} is on {x.device}, v on {v.device}; they must be on one device")
    num_states = B
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"{operator}: with cu_seqlens the batch must be 1 (sequences packed along T), got B={B}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{operator}: cu_seqlens must be int32 or int64 [N+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        num_states = cu_seqlens.numel() - 1
    if initial_state is not None and initial_state.shape != (num_states, H, K, V):
        raise ValueError(
            f"{operator}: initial_state must be {(num_states, H, K, V)} [sequences,H,K,V], "
            f"got {tuple(initial_state.shape)}"
        )


def check_bounds(operator: str, cu_seqlens: Tensor, T: int) -> None:
    """Raise ValueError unless cu_seqlens starts at 0, never falls and ends at T. Reads the values: a host sync."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(x > y for x, y in pairwise(bounds)):
        raise ValueError(f"{operator}: cu_seqlens must start at 0, never fall and end at T={T}, got {bounds}")


def check_step(
    operator: str,
    keys: Mapping[str, Tensor],
    v: Tensor,
    state: Tensor,
    gates: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Raise ValueError unless one token's `keys` (all [B,H,K]), `gates` (all [B,H]) and v [B,H,V] fit the state
    [B,H,K,V]."""
    if state.dim() != 4:
        raise ValueError(f"{operator}: the state must be [B,H,K,V], got {tuple(state.shape)}")
    B, H, K, V = state.shape
    expected = {**dict.fromkeys(keys, (B, H, K)), **dict.fromkeys(gates, (B, H)), "v": (B, H, V)}
    for name, x in {**keys, **gates, "v": v}.items():
        if x.shape != expected[name]:
            raise ValueError(
                f"{operator}: {name} must be {expected[name]} to fit the state {(B, H, K, V)}, got {tuple(x.shape)}"
            )
