"""`window_attention` and `window_attention_step`: one signature for every form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from radlads.kernels.shared.check import check_bounds
from radlads.kernels.shared.chosen import note_kernel
from radlads.kernels.window_attention.chunked import State, window_attention_chunked
from radlads.kernels.window_attention.meta import window_attention_meta
from radlads.kernels.window_attention.reference import window_attention_reference
from radlads.kernels.window_attention.step import window_attention_step_torch

Backend = Literal["reference", "chunked"]
_FORMS = {"reference": window_attention_reference, "chunked": window_attention_chunked}


def window_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    keep_BT: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, State | None]:
    """Softmax attention of each token over the first `sinks` tokens of its sequence and the last `window` ones, itself
    among them; scores are multiplied by `scale`. G kv heads, each for H/G query heads in a row.

    Returns `(out [B,T,H,V] in v's dtype, state or None)`. The state is `(memory [B,G,S+W,K+V] in k's dtype, seen [B])`,
    of one size for any number of tokens (README.md); `initial_state` is the one after the tokens before.

    - `keep_BT`: False at padding, which is not seen, not counted, and has an output of no meaning.
    - `cu_seqlens` (int32 or int64 [N+1], first 0, last T, zero lengths allowed): B is 1, and N sequences lie packed
      along T, without padding and states.
    - Gradients flow to q, k, v and the memory, from the output and from the final memory.
    - `backend`: None is "chunked", torch's fused attention over blocks, O(T·window); "reference" is a loop in fp32.

    Raises ValueError, in one line, for shapes and options that do not fit together.
    """
    _check(q_BTHK, k_BTGK, v_BTGV, sinks, window)
    B, T, G, K = k_BTGK.shape
    if backend is not None and backend not in _FORMS:
        raise ValueError(f"window_attention: unknown backend {backend!r}; choose from {', '.join(_FORMS)}")
    if keep_BT is not None and (keep_BT.shape != (B, T) or keep_BT.dtype != torch.bool):
        raise ValueError(f"window_attention: keep must be bool {(B, T)}, got {keep_BT.dtype} {tuple(keep_BT.shape)}")
    if cu_seqlens is not None:
        if B != 1 or keep_BT is not None or initial_state is not None or output_final_state:
            raise ValueError("window_attention: cu_seqlens needs one row, without keep and without states")
        if not cu_seqlens.is_cuda:  # on a GPU, reading them would wait for it
            check_bounds("window_attention", cu_seqlens, T)
    if initial_state is not None:
        _check_state("window_attention", initial_state, (B, G, sinks + window, K + v_BTGV.shape[-1]))
    if v_BTGV.is_meta:
        form = window_attention_meta
    else:
        form = _FORMS[backend or "chunked"]
        note_kernel("window_attention", f"{backend or 'chunked'} (torch's attention)", lambda: "the only fast form")
    return form(
        q_BTHK,
        k_BTGK,
        v_BTGV,
        sinks=sinks,
        window=window,
        scale=scale,
        keep_BT=keep_BT,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def window_attention_step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    memory_BGSC: Tensor,
    seen_B: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    keep_B: Tensor | None = None,
) -> Tensor:
    """One token for every sequence: updates memory and seen in place and returns the output [B,H,V] in v's dtype.
    keep_B: bool, False where the token is padding, which changes nothing.

    For inference: not differentiable, no host synchronisation. Raises ValueError for shapes that do not fit the state.
    """
    _check(*(x[:, None] for x in (q_BHK, k_BGK, v_BGV)), sinks, window)
    shape = (*k_BGK.shape[:2], sinks + window, k_BGK.shape[-1] + v_BGV.shape[-1])
    _check_state("window_attention_step", (memory_BGSC, seen_B), shape)
    sizes = {"sinks": sinks, "window": window, "scale": scale}
    return window_attention_step_torch(q_BHK, k_BGK, v_BGV, memory_BGSC, seen_B, **sizes, keep_B=keep_B)


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: int, window: int) -> None:
    if sinks < 0 or window < 1:
        raise ValueError(f"window_attention: sinks must be 0 or more, window 1 or more, not {sinks} and {window}")
    fits = q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3]
    if not fits or q.shape[-1] != k.shape[-1] or q.shape[2] % k.shape[2] or min(*q.shape, v.shape[-1]) < 1:
        raise ValueError(
            "window_attention: q, k and v must be [B,T,H,K], [B,T,G,K] and [B,T,G,V], G a divisor of H, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not v.is_floating_point():
        raise ValueError(f"window_attention: q, k and v must be floating, of one dtype, not {q.dtype}, {k.dtype}")


def _check_state(operator: str, state: State, shape: tuple[int, ...]) -> None:
    memory, seen = state
    if memory.shape != shape or seen.shape != shape[:1] or seen.dtype != torch.long:
        raise ValueError(
            f"{operator}: the state must be {shape} and int64 {shape[:1]}, got {tuple(memory.shape)} and {seen.dtype} "
            f"{tuple(seen.shape)}"
        )
