"""The Triton form of wkv6: settings, launches and autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.backends import common_dtype
from radlads.kernels.shared.chosen import note_kernel
from radlads.kernels.shared.triton_launch import (
    ChunkPlan,
    current_backend,
    on_device_of,
    plan_chunks,
    power,
    why_not_in_triton,
)
from radlads.kernels.wkv6.triton_backward import keys_kernel, scan_back_kernel, values_kernel
from radlads.kernels.wkv6.triton_forward import out_kernel, scan_kernel


@dataclass(frozen=True)
class Wkv6Tuning:
    """Launch settings: tokens of a chunk; keys and values of a tile, warps: of the scans and of the other kernels."""

    chunk: int
    scan_tile: int
    scan_warps: int
    stages: int
    tile: int
    warps: int


@dataclass(frozen=True)
class Wkv6Numerics:
    """dot: operands made inside a kernel; raw: operands as loaded; store: states; precision, gate: of fp32 products."""

    dot: Any
    raw: Any
    store: torch.dtype
    precision: str
    gate: str


@dataclass(frozen=True)
class Launch:
    """Launch parameters of the kernels of one call."""

    plan: ChunkPlan
    by_bf16: bool
    tuning: Wkv6Tuning
    numerics: Wkv6Numerics

    @property
    def shared(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "K": plan.K, "V": plan.V, "C": plan.chunk, "TAIL": plan.tail, "PACKED": plan.packed is not None,
            "AS_BF16": self.by_bf16, "GATE": self.numerics.gate, "DT": self.numerics.dot, "IP": self.numerics.precision,
        }  # fmt: skip

    @property
    def scan(self) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and options of the scans."""
        K, V, tile = self.plan.K, self.plan.V, self.tuning.scan_tile
        BK, BV = min(tile, power(K)), min(tile, power(V))
        grid = (self.plan.num_sequences * self.plan.H * triton.cdiv(K, BK) * triton.cdiv(V, BV),)
        options = {"BK": BK, "BV": BV, "STAGES": self.tuning.stages, "num_warps": self.tuning.scan_warps}
        return grid, {**self.shared, **options}

    def tiles(self, size: int) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and options of a kernel over chunks and tiles of `size` columns."""
        tile = self.tuning.tile
        BK, BV = min(tile, power(self.plan.K)), min(tile, power(self.plan.V))
        options = {"BK": BK, "BV": BV, "LEVELS": self.plan.chunk.bit_length() - 4, "num_warps": self.tuning.warps}
        return self.plan.tiles(size, min(tile, power(size))), {**self.shared, **options}


def default_tuning(K: int, V: int, backend: str) -> Wkv6Tuning:
    """The settings in use: a table, so that a resumed run repeats bit for bit."""
    if backend == "interpreter":
        return Wkv6Tuning(32, 64, 4, 1, 64, 4)
    if backend == "hip":
        return Wkv6Tuning(32, 32, 4, 1, 64, 4)
    return Wkv6Tuning(32, 32, 4, 2, 64, 4)  # longer chunks spill registers in keys_kernel


def candidates(backend: str) -> list[Wkv6Tuning]:
    """Settings worth measuring, the default first."""
    others = ((32, 64, 4, 2, 64, 8), (32, 32, 4, 2, 64, 8), (64, 32, 4, 2, 32, 8), (64, 64, 4, 2, 64, 8))
    return [default_tuning(64, 64, backend), *(Wkv6Tuning(*row) for row in others)]


def choose_numerics(dtype: torch.dtype, backend: str) -> Wkv6Numerics:
    """bf16 is multiplied as loaded and stored as bf16; values computed in kernels keep ten bits (tf32)."""
    if backend == "interpreter":
        store = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return Wkv6Numerics(tl.float32, tl.float32, store, "ieee", "ieee")
    gate = "tf32x3" if backend == "cuda" else "ieee"
    if dtype == torch.bfloat16:
        return Wkv6Numerics(tl.float32, tl.bfloat16, torch.bfloat16, "tf32" if backend == "cuda" else "ieee", gate)
    precision = "ieee" if backend == "hip" else "tf32" if dtype == torch.float16 else "tf32x3"
    return Wkv6Numerics(tl.float32, tl.float32, torch.float32, precision, gate)


def why_not_applicable(v: Tensor, K: int, dtype: torch.dtype) -> str | None:
    """Why these tensors, multiplied in dtype, cannot go through the Triton kernels; None if they can."""
    return why_not_in_triton(v, K, current_backend())


def wkv6_triton(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    tuning: Wkv6Tuning | None = None,
    numerics: Wkv6Numerics | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `wkv6`, for bf16, fp16 and fp32 inputs with K, V ≤ 256 on a GPU (or in Triton's interpreter). Any decay."""
    backend = current_backend()
    tuning = tuning or default_tuning(k_BTHK.shape[-1], v_BTHV.shape[-1], backend)
    numerics = numerics or choose_numerics(common_dtype(r_BTHK, k_BTHK, v_BTHV), backend)
    note_kernel("wkv6", "triton")
    by_bf16 = log_decay_BTHK.dtype == torch.bfloat16 and backend != "interpreter"
    launch = Launch(plan_chunks(k_BTHK, v_BTHV, cu_seqlens, tuning.chunk), by_bf16, tuning, numerics)
    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV)
    with on_device_of(v_BTHV):
        out, final_state = _TritonWkv6.apply(launch, initial_state, *inputs)
    return out, (final_state if output_final_state else None)


class _TritonWkv6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, launch: Launch, initial_state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        r, w, k, v = inputs = tuple(x.contiguous() for x in inputs)
        h0 = None if initial_state is None else initial_state.contiguous()
        plan = launch.plan
        H, K, V = plan.H, plan.K, plan.V
        states = torch.empty(plan.num_slots * H, K, V, dtype=launch.numerics.store, device=v.device)
        final = torch.empty(plan.num_sequences, H, K, V, dtype=torch.float32, device=v.device)
        out = torch.empty_like(v)
        grid, options = launch.scan
        scan_kernel[grid](
            w, k, v, states, h0, final, *plan.where, plan.T, plan.num_chunks, H, INITIAL=h0 is not None, **options
        )
        grid, options = launch.tiles(V)
        out_kernel[grid](
            r, w, k, v, states, out, *plan.where, plan.num_sequences, plan.T, plan.num_chunks, H, **options
        )
        ctx.save_for_backward(*inputs, states)
        ctx.launch, ctx.state_dtype = launch, None if h0 is None else h0.dtype
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, w, k, v, states = ctx.saved_tensors
        launch, plan, dout, dfinal = ctx.launch, ctx.launch.plan, dout.contiguous(), dfinal.contiguous()
        dstates = torch.empty_like(states)
        dinitial = torch.empty_like(dfinal)
        dr, dw, dk, dv = (torch.empty_like(x) for x in (r, w, k, v))
        lengths = (plan.T, plan.num_chunks, plan.H)
        with on_device_of(v):
            grid, options = launch.scan
            scan_back_kernel[grid](r, w, dout, dstates, dfinal, dinitial, *plan.where, *lengths, **options)
            grid, options = launch.tiles(plan.V)
            values_kernel[grid](r, w, k, dout, dstates, dv, *plan.where, plan.num_sequences, *lengths, **options)
            grid, options = launch.tiles(plan.K)
            keys_kernel[grid](
                r, w, k, v, dout, states, dstates, dr, dw, dk, *plan.where, plan.num_sequences, *lengths,
                RT=launch.numerics.raw, **options,
            )  # fmt: skip
        return None, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), dr, dw, dk, dv
