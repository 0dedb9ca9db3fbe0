"""`gated_delta` and `gated_delta_step`: one signature for every backend."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from radlads.kernels.gated_delta.chunked import gated_delta_chunked
from radlads.kernels.gated_delta.meta import gated_delta_meta
from radlads.kernels.gated_delta.reference import gated_delta_reference
from radlads.kernels.gated_delta.step import gated_delta_step_torch
from radlads.kernels.shared.backends import Forms, GpuForm
from radlads.kernels.shared.check import check_step

Backend = Literal["reference", "chunked", "fla"]


def _on_gpu() -> GpuForm:
    from radlads.kernels.gated_delta.fla_op import gated_delta_fla, why_not_applicable

    return GpuForm(gated_delta_fla, why_not_applicable)


FORMS = Forms(
    "gated_delta",
    gated_delta_reference,
    gated_delta_chunked,
    gated_delta_meta,
    _on_gpu,
    ("q", "k", "v", "log_decay", "beta"),
    gpu="fla",
    gates=("log_decay", "beta"),
)


def gated_delta(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over whole sequences. Per head, with the state S [K,V] and decay_t = exp(log_decay_t):

        S_t = decay_t (I - beta_t k_t k_tᵀ) S_{t-1} + beta_t k_t v_tᵀ,        o_t = q_tᵀ S_t

    Returns `(out [B,T,H,V] in v's dtype, final state [B,H,K,V] in fp32 or None)`. Neither q nor k is normalised inside,
    and nothing is scaled by 1/sqrt(K); with unit keys and beta in [0, 1] the state stays bounded.

    - `initial_state` [B,H,K,V], default zeros. With `cu_seqlens` (int32 or int64 [N+1], first 0, last T, zero lengths
      allowed) B is 1, N sequences lie packed along T, and the states are [N,H,K,V].
    - Inputs may be bf16, fp16, fp32 or fp64, and need not be contiguous. Sums and states are fp32 (for fp64, fp64).
      Gradients flow to all five inputs and to `initial_state`, from `out` and from the final state.
    - `backend`: None picks fla's kernels on a GPU where fla-core is installed and they apply, else "chunked" (plain
      torch); "reference" is a loop.

    Raises ValueError, in one line, for shapes, dtypes or boundaries that do not fit together and an unknown backend.
    """
    inputs = {"q": q_BTHK, "k": k_BTHK, "v": v_BTHV, "log_decay": log_decay_BTH, "beta": beta_BTH}
    states = {"initial_state": initial_state, "output_final_state": output_final_state}
    return FORMS.run(inputs, backend, cu_seqlens, **states)


def gated_delta_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BH: Tensor, beta_BH: Tensor, state_BHKV: Tensor
) -> Tensor:
    """One token for every sequence: updates `state_BHKV` (fp32) in place and returns the output [B,H,V] in v's dtype.

    For inference: not differentiable, no host synchronisation. Raises ValueError for shapes that do not fit the state.
    """
    gates = {"log_decay": log_decay_BH, "beta": beta_BH}
    check_step("gated_delta_step", {"q": q_BHK, "k": k_BHK}, v_BHV, state_BHKV, gates)
    return gated_delta_step_torch(q_BHK, k_BHK, v_BHV, log_decay_BH, beta_BH, state_BHKV)
