"""The fused form of wkv7: launches and autograd. The kernels over heads are Triton's or, on Hopper, hopper_*.py's."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.triton_launch import ChunkPlan, current_backend, on_device_of, power
from radlads.kernels.wkv7.decay_range import WATCH
from radlads.kernels.wkv7.triton_fused_backward import fused_backward_kernel, middles_kernel
from radlads.kernels.wkv7.triton_fused_forward import NUM_SCALES, fused_forward_kernel, solve_kernel
from radlads.kernels.wkv7.triton_tuning import Fused

# Limit of the exponents of half a chunk, in bits: above it a scaled operand may overflow fp16. RWKV-7 stays below 15.
MOST_BITS = 15.5


def widest_fused_decay(chunk: int) -> float:
    """The strongest log decay per token (a positive number), if every token had it, within MOST_BITS."""
    return MOST_BITS * math.log(2) / (chunk // 2)


class FusedWkv7(torch.autograd.Function):
    """(plan, settings, initial state or None, the six inputs)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, plan: ChunkPlan, tuning: Fused, initial_state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = tuple(_aligned(x) for x in inputs)
        h0 = None if initial_state is None else initial_state.contiguous()
        out, final, saved = _forward(plan, tuning, True, h0, inputs)
        ctx.save_for_backward(*inputs, *saved)
        ctx.call, ctx.state_dtype = (plan, tuning), None if h0 is None else h0.dtype
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: non-reentrant checkpointing refuses a second read
        with on_device_of(dout):
            grads, dinitial = _backward(*ctx.call, saved[:6], saved[6:], _aligned(dout), dfinal.contiguous())
        return None, None, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), *grads


def run_fused(plan: ChunkPlan, tuning: Fused, initial_state: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Without a node of autograd, which costs the host as much as a launch."""
    h0 = None if initial_state is None else initial_state.contiguous()
    return _forward(plan, tuning, False, h0, tuple(_aligned(x) for x in inputs))[:2]


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and aligned to sixteen bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _shared(plan: ChunkPlan) -> dict[str, Any]:
    real = current_backend() != "interpreter"
    return {
        "K": plan.K, "BK": power(plan.K), "PACKED": plan.packed is not None,
        "DT": tl.float16 if real else tl.float32, "IP": "tf32" if current_backend() == "cuda" else "ieee",
    }  # fmt: skip


def _hopper(plan: ChunkPlan) -> dict[str, Any]:
    BK = power(plan.K)
    return {
        "K": plan.K, "V": plan.V, "BK": BK, "BV": power(plan.V), "PACKED": plan.packed is not None, "W": BK // 16,
        "num_warps": BK // 16,
    }  # fmt: skip


def gate_type(log_decay: Tensor) -> tuple[Any, str]:
    """The type in which a triangle of ones sums log decays exactly, and how precisely products of it are taken."""
    backend = current_backend()
    if backend == "interpreter" or log_decay.dtype not in (torch.bfloat16, torch.float16):
        return tl.float32, "tf32x3" if backend == "cuda" else "ieee"
    return tl.bfloat16 if log_decay.dtype == torch.bfloat16 else tl.float16, "ieee"


def _forward(
    plan: ChunkPlan, tuning: Fused, store: bool, h0: Tensor | None, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    r, w, _, v, a, b = inputs
    H, K, V, C = plan.H, plan.K, plan.V, plan.chunk
    tiles, shared = plan.num_slots * H, _shared(plan)
    half = torch.float16 if shared["DT"] is tl.float16 else torch.float32

    def empty(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=v.device)

    inverse = empty(tiles, C, C)
    taken = empty(tiles, C, C // 2) if store else None
    kept = 2 if tuning.middles_warps else 1
    states = empty(tiles, kept, K, V) if store else None
    scales = empty(tiles, NUM_SCALES, dtype=torch.float32) if store else None
    U = empty(*v.shape) if store else None
    out = torch.empty_like(v)
    final = empty(plan.num_sequences, H, K, V, dtype=torch.float32)
    reach = torch.zeros(1, dtype=torch.float32, device=v.device)
    by_dot = w.dtype == torch.bfloat16 and half == torch.float16
    chunked = {"C": C, "TAIL": plan.tail, "STORE": store, "CUMULATE_BY_DOT": by_dot}
    solve_kernel[(tiles,)](
        r, w, a, b, inverse, taken, scales, reach, *plan.where, plan.num_sequences, plan.T, plan.num_chunks, H,
        **shared, **chunked, LEVELS=C.bit_length() - 1, LIMIT=MOST_BITS, num_warps=tuning.solve_warps,
    )  # fmt: skip
    if WATCH.looks:
        # The bits as a log decay per token, for the error message.
        strongest = reach * (-math.log(2) / (C // 2))
        WATCH.note(torch.cat((strongest, -reach * 0)), widest_fused_decay(C), tuple(w.shape))
    arguments = (*inputs, inverse, out, states, scales, U, h0, final, *plan.where, plan.T, plan.num_chunks, H)
    options = {"C": C, "TAIL": plan.tail, "STORE": store, "INITIAL": h0 is not None, "KEPT": kept}
    grid = (plan.num_sequences * H,)
    if tuning.hopper:
        from radlads.kernels.wkv7.hopper_forward import hopper_forward_kernel

        hopper_forward_kernel[grid](*arguments, **options, **_hopper(plan))
    else:
        fused_forward_kernel[grid](
            *arguments, **options, **shared, CUMULATE_BY_DOT=by_dot, V=V, BV=power(V), STAGES=tuning.forward_stages,
            num_warps=tuning.forward_warps,
        )  # fmt: skip
    return out, final, (inverse, taken, states, scales, U) if store else ()


def _backward(
    plan: ChunkPlan, tuning: Fused, inputs: tuple[Tensor, ...], saved: tuple[Tensor, ...], dout: Tensor, dfinal: Tensor
) -> tuple[list[Tensor], Tensor]:
    inverse, taken, states, scales, U = saved
    grads = [torch.empty_like(x) for x in inputs]
    dinitial = torch.empty_like(dfinal)
    gates, precision = gate_type(inputs[1])
    shared = _shared(plan) | {
        "V": plan.V, "BV": power(plan.V), "C": plan.chunk // 2, "WT": gates, "WP": precision
    }  # fmt: skip
    _, w, k, v, _, b = inputs
    if tuning.middles_warps and not tuning.hopper:
        middles_kernel[(plan.num_slots * plan.H,)](
            w, k, v, b, states, scales, U, *plan.where, plan.num_sequences, plan.T, plan.num_chunks, plan.H,
            **shared, num_warps=tuning.middles_warps,
        )  # fmt: skip
    arguments = (*inputs, inverse, taken, dout, states, scales, U, dfinal, *grads, dinitial, *plan.where)
    arguments += (plan.T, plan.num_chunks, plan.H)
    grid, kept = (plan.num_sequences * plan.H,), states.shape[1]
    if tuning.hopper:
        from radlads.kernels.wkv7.hopper_backward import hopper_backward_kernel

        pieces = 2 if tuning.backward_split else 1
        hopper_backward_kernel[(grid[0] * pieces,)](
            *arguments, C=plan.chunk // 2, TAIL=plan.tail, KEPT=kept, SPLIT=pieces == 2, **_hopper(plan)
        )
    else:
        fused_backward_kernel[grid](
            *arguments, **shared, KEPT=kept, STAGES=tuning.backward_stages, num_warps=tuning.backward_warps
        )
    return grads, dinitial
