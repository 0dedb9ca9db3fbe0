"""The Triton form of wkv7: launches and autograd."""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.backends import common_dtype
from radlads.kernels.shared.chosen import note_kernel
from radlads.kernels.shared.triton_launch import (
    ChunkPlan,
    cdiv,
    current_backend,
    on_device_of,
    plan_chunks,
    power,
    why_not_in_triton,
)
from radlads.kernels.wkv7.decay_range import WATCH, widest_log_decay
from radlads.kernels.wkv7.triton_backward import keys_kernel, scan_back_kernel, values_kernel
from radlads.kernels.wkv7.triton_forward import scan_kernel, terms_kernel
from radlads.kernels.wkv7.triton_fused import FusedWkv7, run_fused
from radlads.kernels.wkv7.triton_tuning import (
    Call,
    Fused,
    Wkv7Numerics,
    Wkv7Tuning,
    choose_numerics,
    default_tuning,
    fused_tuning,
    hopper_here,
    hopper_takes,
    name_form,
    why_slower,
)

TRITON_TYPES = {torch.float16: triton.language.float16, torch.float32: triton.language.float32}


def wkv7_triton(
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
    tuning: Wkv7Tuning | Fused | None = None,
    numerics: Wkv7Numerics | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `wkv7`, for bf16, fp16 and fp32 inputs with K, V ≤ 256 on a GPU (or in Triton's interpreter)."""
    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    differentiable = (*inputs, *(() if initial_state is None else (initial_state,)))
    store = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    H, K, V = *k_BTHK.shape[2:], v_BTHV.shape[-1]
    num_sequences = k_BTHK.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    backend = current_backend()
    dtype = common_dtype(r_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    if tuning is None and numerics is None:
        call = Call(K, V, num_sequences * H, dtype, log_decay_BTHK.dtype, backend)
        hopper = hopper_takes(K, V, log_decay_BTHK.dtype) and hopper_here(v_BTHV.device)
        tuning = fused_tuning(K, V, call.heads, dtype, backend, hopper=hopper)
        note_kernel("wkv7", name_form(tuning), partial(why_slower, tuning, call, v_BTHV.device))
    with on_device_of(v_BTHV):
        if isinstance(tuning, Fused):
            plan = plan_chunks(k_BTHK, v_BTHV, cu_seqlens, tuning.chunk)
            run = FusedWkv7.apply if store else run_fused
            out, final_state = run(plan, tuning, initial_state, *inputs)
        else:
            tuning = tuning or default_tuning(K, V, backend)
            numerics = numerics or choose_numerics(dtype, backend, wide=max(K, V) > 128)
            WATCH.look(log_decay_BTHK, widest_log_decay(tuning.chunk))
            plan = plan_chunks(k_BTHK, v_BTHV, cu_seqlens, tuning.chunk)
            run = _TritonWkv7.apply if store else _run
            out, final_state = run(plan, tuning, numerics, initial_state, *inputs)
    return out, (final_state if output_final_state else None)


def why_not_applicable(v: Tensor, K: int, dtype: torch.dtype) -> str | None:
    """Why these tensors, multiplied in dtype, cannot go through the Triton kernels; None if they can."""
    backend, wide = current_backend(), max(K, v.shape[-1])
    if reason := why_not_in_triton(v, K, backend):
        return reason
    if wide > 128 and (backend == "hip" or (backend == "cuda" and dtype != torch.bfloat16)):
        limit = "an AMD GPU" if backend == "hip" else f"a GPU in {str(dtype).removeprefix('torch.')}"
        return f"head sizes above 128 do not fit the shared memory of {limit}, got K={K}, V={v.shape[-1]}"
    return None


def _run(
    plan: ChunkPlan, tuning: Wkv7Tuning, numerics: Wkv7Numerics, initial_state: Tensor | None, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Without a node of autograd, which costs the host as much as a launch."""
    h0 = None if initial_state is None else initial_state.contiguous()
    return _forward(plan, tuning, numerics, False, h0, tuple(x.contiguous() for x in inputs))[:2]


class _TritonWkv7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        plan: ChunkPlan,
        tuning: Wkv7Tuning,
        numerics: Wkv7Numerics,
        initial_state: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = tuple(x.contiguous() for x in inputs)
        h0 = None if initial_state is None else initial_state.contiguous()
        out, final, saved = _forward(plan, tuning, numerics, True, h0, inputs)
        ctx.save_for_backward(*inputs, *saved)
        ctx.plan, ctx.state_dtype = (plan, tuning, numerics), None if h0 is None else h0.dtype
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: non-reentrant checkpointing refuses a second read
        with on_device_of(dout):
            grads, dinitial = _backward(*ctx.plan, saved[:6], saved[6:], dout.contiguous(), dfinal.contiguous())
        return None, None, None, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), *grads


def _forward(
    plan: ChunkPlan, tuning: Wkv7Tuning, kind: Wkv7Numerics, store: bool, h0: Tensor | None, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    r, _, _, v, _, _ = inputs
    H, K, V, C = plan.H, plan.K, plan.V, plan.chunk
    tiles = plan.num_slots * H
    L = torch.empty(tiles, K, K, dtype=kind.store, device=v.device)
    N = torch.empty(tiles, K, V, dtype=kind.store, device=v.device)
    Q = torch.empty(r.shape, dtype=kind.store, device=v.device)
    partial = torch.empty(v.shape, dtype=kind.store, device=v.device)
    decay = torch.empty(tiles, K, dtype=torch.float32, device=v.device)
    enter = torch.empty_like(decay) if store else None
    inverse = torch.empty(tiles, C, C, dtype=kind.triangle, device=v.device) if store else None
    states = torch.empty(tiles, K, V, dtype=kind.store, device=v.device) if store else None
    out = torch.empty_like(v)
    final = torch.empty(plan.num_sequences, H, K, V, dtype=torch.float32, device=v.device)
    terms_kernel[(tiles,)](
        *inputs, L, N, Q, partial, decay, enter, inverse, *plan.where, plan.num_sequences, plan.T, plan.num_chunks, H,
        K=K, V=V, BK=power(K), BV=power(V), C=C, LEVELS=C.bit_length() - 1, TAIL=plan.tail,
        PACKED=plan.packed is not None, STORE=store, CUMULATE_BY_DOT=_by_dot(inputs[1]),
        DT=kind.dot, TT=TRITON_TYPES[kind.triangle], IP=kind.precision, num_warps=tuning.terms_warps,
    )  # fmt: skip
    scan = tuning.scan
    scan_kernel[(plan.num_sequences * H * cdiv(V, scan.values),)](
        L, N, Q, partial, decay, enter, out, states, h0, final, *plan.where, plan.T, plan.num_chunks, H,
        K=K, V=V, BK=power(K), BV=scan.values, C=C, TAIL=plan.tail, PACKED=plan.packed is not None,
        INITIAL=h0 is not None, STORE=store, RT=kind.raw, IP=kind.precision, STAGES=scan.stages, num_warps=scan.warps,
    )  # fmt: skip
    return out, final, (L, Q, decay, enter, inverse, states) if store else ()


def _backward(
    plan: ChunkPlan,
    tuning: Wkv7Tuning,
    kind: Wkv7Numerics,
    inputs: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dout: Tensor,
    dfinal: Tensor,
) -> tuple[list[Tensor], Tensor]:
    L, Q, decay, enter, inverse, states = saved
    v = inputs[3]
    H, K, V = plan.H, plan.K, plan.V
    dstates = torch.empty_like(states)
    dinitial = torch.empty(plan.num_sequences, H, K, V, dtype=torch.float32, device=v.device)
    shared = {"K": K, "V": V, "C": tuning.chunk, "TAIL": plan.tail, "PACKED": plan.packed is not None}
    lengths = (plan.T, plan.num_chunks, H)
    scan_back_kernel[(plan.num_sequences * H * cdiv(V, tuning.back.values),)](
        L, Q, decay, enter, dout, dstates, dfinal, dinitial, *plan.where, *lengths,
        **shared, BK=power(K), BV=tuning.back.values, RT=kind.raw, IP=kind.precision, STAGES=tuning.back.stages,
        num_warps=tuning.back.warps,
    )  # fmt: skip
    U = torch.empty(v.shape, dtype=torch.float32, device=v.device)  # bf16 would give visible errors for repeated keys
    X = torch.empty_like(U)
    dr, dw, dk, dv, da, db = grads = [torch.empty_like(x) for x in inputs]
    tile = tuning.values
    values_kernel[plan.tiles(V, tile.values)](
        *inputs, dout, states, dstates, inverse, U, X, dv, *plan.where, plan.num_sequences, *lengths,
        **shared, BK=tile.keys, BV=tile.values, CUMULATE_BY_DOT=_by_dot(inputs[1]), DT=kind.dot, IP=kind.precision,
        num_warps=tile.warps,
    )  # fmt: skip
    tile = tuning.keys
    keys_kernel[plan.tiles(K, tile.keys)](
        *inputs, dout, states, dstates, U, X, dr, dw, dk, da, db, *plan.where, plan.num_sequences, *lengths,
        **shared, BK=tile.keys, BV=tile.values, CUMULATE_BY_DOT=_by_dot(inputs[1]), DT=kind.dot, RT=kind.dot,
        IP=kind.precision, num_warps=tile.warps,
    )  # fmt: skip
    return grads, dinitial


def _by_dot(log_decay: Tensor) -> bool:
    return log_decay.dtype == torch.bfloat16 and current_backend() != "interpreter"
