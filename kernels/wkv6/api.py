"""`wkv6` and `wkv6_step`: one signature for every backend."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from radlads.kernels.shared.backends import Forms, GpuForm
from radlads.kernels.shared.check import check_step
from radlads.kernels.shared.meta import wkv6_meta
from radlads.kernels.wkv6.chunked import wkv6_chunked
from radlads.kernels.wkv6.reference import wkv6_reference
from radlads.kernels.wkv6.step import wkv6_step_torch

Backend = Literal["reference", "chunked", "triton"]


def _on_gpu() -> GpuForm:
    from radlads.kernels.wkv6.triton_op import why_not_applicable, wkv6_triton

    return GpuForm(wkv6_triton, why_not_applicable)


FORMS = Forms("wkv6", wkv6_reference, wkv6_chunked, wkv6_meta, _on_gpu, ("r", "log_decay", "k", "v"))


def wkv6(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The RAD-RWKV6 operator over whole sequences. Per head, with the state S [K,V]:

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tᵀ,        o_t = r_tᵀ S_t

    Returns `(out [B,T,H,V] in v's dtype, final state [B,H,K,V] in fp32 or None)`. The output includes the current
    token; there is no bonus, and no scaling by 1/sqrt(K) inside.

    - `initial_state` [B,H,K,V], default zeros. With `cu_seqlens` (int32 or int64 [N+1], first 0, last T, zero lengths
      allowed) B is 1, N sequences lie packed along T, and the states are [N,H,K,V].
    - Inputs may be bf16, fp16, fp32 or fp64, and need not be contiguous. Sums and states are fp32 (for fp64, fp64).
      Gradients flow to all four inputs and to `initial_state`, from `out` and from the final state.
    - The log decay of RAD-RWKV6 lies in [-5, 0]; outside it the result stays correct.
    - `backend`: None picks Triton on a GPU where it applies, else "chunked" (plain torch); "reference" is a loop.

    Raises ValueError, in one line, for shapes, dtypes or boundaries that do not fit together and an unknown backend.
    """
    inputs = {"r": r_BTHK, "log_decay": log_decay_BTHK, "k": k_BTHK, "v": v_BTHV}
    return FORMS.run(inputs, backend, cu_seqlens, initial_state=initial_state, output_final_state=output_final_state)


def wkv6_step(r_BHK: Tensor, log_decay_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, state_BHKV: Tensor) -> Tensor:
    """One token for every sequence: updates `state_BHKV` (fp32) in place and returns the output [B,H,V] in v's dtype.

    For inference: not differentiable, no host synchronisation. Raises ValueError for shapes that do not fit the state.
    """
    check_step("wkv6_step", {"r": r_BHK, "log_decay": log_decay_BHK, "k": k_BHK}, v_BHV, state_BHKV)
    return wkv6_step_torch(r_BHK, log_decay_BHK, k_BHK, v_BHV, state_BHKV)
