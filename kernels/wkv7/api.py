"""`wkv7` and `wkv7_step`: one signature for every backend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from radlads.kernels.shared.backends import Forms, GpuForm, triton_installed
from radlads.kernels.shared.check import check_step
from radlads.kernels.shared.chosen import note_kernel
from radlads.kernels.shared.meta import wkv7_meta
from radlads.kernels.wkv7.chunked import wkv7_chunked
from radlads.kernels.wkv7.reference import wkv7_reference
from radlads.kernels.wkv7.step import wkv7_delta_step_torch, wkv7_step_torch

Backend = Literal["reference", "chunked", "triton"]


def _on_gpu() -> GpuForm:
    from radlads.kernels.wkv7.triton_op import why_not_applicable, wkv7_triton

    return GpuForm(wkv7_triton, why_not_applicable)


FORMS = Forms("wkv7", wkv7_reference, wkv7_chunked, wkv7_meta, _on_gpu, ("r", "log_decay", "k", "v", "a", "b"))


def wkv7(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The RWKV-7 operator over whole sequences. Per head, with the state S [K,V]:

        S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ,        o_t = r_tᵀ S_t

    Returns `(out [B,T,H,V] in v's dtype, final state [B,H,K,V] in fp32 or None)`. No scaling by 1/sqrt(K) inside.

    - `initial_state` [B,H,K,V], default zeros. With `cu_seqlens` (int32 or int64 [N+1], first 0, last T, zero lengths
      allowed) B is 1, N sequences lie packed along T, and the states are [N,H,K,V].
    - Inputs may be bf16, fp16, fp32 or fp64, and need not be contiguous. Sums and states are fp32 (for fp64, fp64).
      Gradients flow to all six inputs and to `initial_state`, from `out` and from the final state.
    - The fast range of the log decay is [-0.6065, 0], RWKV-7's. Outside it the torch forms stay correct, by shorter
      chunks; Triton's output is not finite, and `decay_range.LogDecayRangeError` follows at a later call.
    - `backend`: None picks Triton on a GPU where it applies, else "chunked" (plain torch); "reference" is a loop.

    Raises ValueError, in one line, for shapes, dtypes or boundaries that do not fit together and an unknown backend.
    """
    inputs = {"r": r_BTHK, "log_decay": log_decay_BTHK, "k": k_BTHK, "v": v_BTHV, "a": a_BTHK, "b": b_BTHK}
    return FORMS.run(inputs, backend, cu_seqlens, initial_state=initial_state, output_final_state=output_final_state)


def wkv7_step(
    r_BHK: Tensor, log_decay_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, a_BHK: Tensor, b_BHK: Tensor, state_BHKV: Tensor
) -> Tensor:
    """One token for every sequence: updates `state_BHKV` (fp32) in place and returns the output [B,H,V] in v's dtype.

    For inference: not differentiable, no host synchronisation. Raises ValueError for shapes that do not fit the state.
    """
    keys = {"r": r_BHK, "log_decay": log_decay_BHK, "k": k_BHK, "a": a_BHK, "b": b_BHK}
    check_step("wkv7_step", keys, v_BHV, state_BHKV)
    inputs = (r_BHK, log_decay_BHK, k_BHK, v_BHV, a_BHK, b_BHK)
    if _steps_in_triton(v_BHV, state_BHKV):
        from radlads.kernels.wkv7.triton_step import wkv7_step_triton

        return wkv7_step_triton(*inputs, state_BHKV)
    return wkv7_step_torch(*inputs, state_BHKV)


def wkv7_delta_step(
    r_BHK: Tensor,
    log_decay_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    kk_BHK: Tensor,
    iclr_BHK: Tensor,
    state_BHKV: Tensor,
) -> Tensor:
    """`wkv7_step` with the delta rule's own arguments: the unit removal key kk and its learning rate (a = -kk,
    b = kk ⊙ iclr), so that a and b are never stored in memory. Raises ValueError for shapes that do not fit the
    state."""
    keys = {"r": r_BHK, "log_decay": log_decay_BHK, "k": k_BHK, "kk": kk_BHK, "iclr": iclr_BHK}
    check_step("wkv7_delta_step", keys, v_BHV, state_BHKV)
    inputs = (r_BHK, log_decay_BHK, k_BHK, v_BHV, kk_BHK, iclr_BHK)
    if _steps_in_triton(v_BHV, state_BHKV):
        from radlads.kernels.wkv7.triton_step import wkv7_step_triton

        return wkv7_step_triton(*inputs, state_BHKV, delta=True)
    return wkv7_delta_step_torch(*inputs, state_BHKV)


def _steps_in_triton(v: Tensor, state: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    fits = state.is_cuda and state.dtype == torch.float32 and state.is_contiguous()
    fits = fits and v.dtype != torch.float64 and max(state.shape[2:]) <= 256 and triton_installed()
    note_kernel("wkv7_step", "triton" if fits else "plain torch")
    return fits
