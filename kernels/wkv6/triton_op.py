"""The Triton form of wkv6: settings, launches and autograd."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.backends import common_dtype
from radlads.kernels.shared.chosen import note_kernel
from radlads.kernels.wkv6.triton_backward import keys_kernel, scan_back_kernel, values_kernel
from radlads.kernels.wkv6.triton_forward import out_kernel, scan_kernel


@dataclass(frozen=True)
class Tuning:
    """Launch settings: tokens of a chunk; keys and values of a tile, warps: of the scans and of the other kernels."""

    chunk: int
    scan_tile: int
    scan_warps: int
    stages: int
    tile: int
    warps: int


@dataclass(frozen=True)
class Numerics:
    """dot: operands made inside a kernel; raw: operands as loaded; store: states; precision, gate: of fp32 products."""

    dot: Any
    raw: Any
    store: torch.dtype
    precision: str
    gate: str


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a tensor of it."""

    T: int
    H: int
    K: int
    V: int
    num_sequences: int
    num_chunks: int
    num_slots: int
    packed: tuple[Tensor, Tensor] | None
    tail: bool
    by_bf16: bool
    tuning: Tuning
    numerics: Numerics

    @property
    def where(self) -> tuple[Any, ...]:
        return self.packed or (None, None)

    @property
    def shared(self) -> dict[str, Any]:
        return {
            "K": self.K, "V": self.V, "C": self.tuning.chunk, "TAIL": self.tail, "PACKED": self.packed is not None,
            "AS_BF16": self.by_bf16, "GATE": self.numerics.gate, "DT": self.numerics.dot, "IP": self.numerics.precision,
        }  # fmt: skip

    @property
    def scan(self) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and options of the scans."""
        BK, BV = _tile(self.K, self.tuning.scan_tile), _tile(self.V, self.tuning.scan_tile)
        grid = (self.num_sequences * self.H * triton.cdiv(self.K, BK) * triton.cdiv(self.V, BV),)
        options = {"BK": BK, "BV": BV, "STAGES": self.tuning.stages, "num_warps": self.tuning.scan_warps}
        return grid, {**self.shared, **options}

    def tiles(self, size: int) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and options of a kernel over chunks and tiles of `size` columns."""
        tile = self.tuning.tile
        options = {"BK": _tile(self.K, tile), "BV": _tile(self.V, tile), "num_warps": self.tuning.warps}
        grid = (self.num_slots * self.H * triton.cdiv(size, _tile(size, tile)),)
        return grid, {**self.shared, **options, "LEVELS": self.tuning.chunk.bit_length() - 4}


def default_tuning(K: int, V: int, backend: str) -> Tuning:
    """The settings in use: a table, so that a resumed run repeats bit for bit."""
    if backend == "interpreter":
        return Tuning(32, 64, 4, 1, 64, 4)
    if backend == "hip":
        return Tuning(32, 32, 4, 1, 64, 4)
    return Tuning(32, 32, 4, 2, 64, 4)  # longer chunks spill registers in keys_kernel


def candidates(backend: str) -> list[Tuning]:
    """Settings worth measuring, the default first."""
    others = ((32, 64, 4, 2, 64, 8), (32, 32, 4, 2, 64, 8), (64, 32, 4, 2, 32, 8), (64, 64, 4, 2, 64, 8))
    return [default_tuning(64, 64, backend), *(Tuning(*row) for row in others)]


def choose_numerics(dtype: torch.dtype, backend: str) -> Numerics:
    """bf16 is multiplied as loaded and kept as bf16; what kernels make of it keeps ten bits (tf32)."""
    if backend == "interpreter":
        store = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return Numerics(tl.float32, tl.float32, store, "ieee", "ieee")
    gate = "tf32x3" if backend == "cuda" else "ieee"
    if dtype == torch.bfloat16:
        return Numerics(tl.float32, tl.bfloat16, torch.bfloat16, "tf32" if backend == "cuda" else "ieee", gate)
    precision = "ieee" if backend == "hip" else "tf32" if dtype == torch.float16 else "tf32x3"
    return Numerics(tl.float32, tl.float32, torch.float32, precision, gate)


def current_backend() -> str:
    """ "interpreter", "cuda" or "hip"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def why_not_applicable(v: Tensor, K: int, dtype: torch.dtype) -> str | None:
    """Why these tensors, multiplied in dtype, cannot go through the Triton kernels; None if they can."""
    if current_backend() != "interpreter" and not v.is_cuda:
        return f"the tensors are on {v.device}, not on a GPU"
    if v.dtype == torch.float64:
        return "float64 is not supported"
    if max(K, v.shape[-1]) > 256:
        return f"head sizes above 256 are not supported, got K={K}, V={v.shape[-1]}"
    return None


def wkv6_triton(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    tuning: Tuning | None = None,
    numerics: Numerics | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `wkv6`, for bf16, fp16 and fp32 inputs with K, V ≤ 256 on a GPU (or in Triton's interpreter). Any decay."""
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    backend = current_backend()
    tuning = tuning or default_tuning(K, V, backend)
    numerics = numerics or choose_numerics(common_dtype(r_BTHK, k_BTHK, v_BTHV), backend)
    note_kernel("wkv6", "triton")
    C = tuning.chunk
    by_bf16 = log_decay_BTHK.dtype == torch.bfloat16 and backend != "interpreter"
    if cu_seqlens is None:
        sizes, packed, tail = (B, triton.cdiv(T, C), B * triton.cdiv(T, C)), None, T % C != 0
    else:
        bounds = cu_seqlens.to(device=v_BTHV.device, dtype=torch.int64)
        chunks = (bounds.diff() + (C - 1)) // C
        n = bounds.numel() - 1
        packed, tail = (bounds, torch.nn.functional.pad(chunks.cumsum(0), (1, 0))), True
        sizes = (n, 0, (T + n * (C - 1)) // C)
    plan = Plan(T, H, K, V, *sizes, packed, tail, by_bf16, tuning, numerics)
    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV)
    with torch.cuda.device(v_BTHV.device) if v_BTHV.is_cuda else nullcontext():
        out, final_state = _TritonWkv6.apply(plan, initial_state, *inputs)
    return out, (final_state if output_final_state else None)


class _TritonWkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, plan: Plan, initial_state: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        r, w, k, v = inputs = tuple(x.contiguous() for x in inputs)
        h0 = None if initial_state is None else initial_state.contiguous()
        H, K, V = plan.H, plan.K, plan.V
        states = torch.empty(plan.num_slots * H, K, V, dtype=plan.numerics.store, device=v.device)
        final = torch.empty(plan.num_sequences, H, K, V, dtype=torch.float32, device=v.device)
        out = torch.empty_like(v)
        grid, options = plan.scan
        scan_kernel[grid](
            w, k, v, states, h0, final, *plan.where, plan.T, plan.num_chunks, H, INITIAL=h0 is not None, **options
        )
        grid, options = plan.tiles(V)
        out_kernel[grid](
            r, w, k, v, states, out, *plan.where, plan.num_sequences, plan.T, plan.num_chunks, H, **options
        )
        ctx.save_for_backward(*inputs, states)
        ctx.plan, ctx.state_dtype = plan, None if h0 is None else h0.dtype
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, w, k, v, states = ctx.saved_tensors
        plan, dout, dfinal = ctx.plan, dout.contiguous(), dfinal.contiguous()
        dstates = torch.empty_like(states)
        dinitial = torch.empty_like(dfinal)
        dr, dw, dk, dv = (torch.empty_like(x) for x in (r, w, k, v))
        lengths = (plan.T, plan.num_chunks, plan.H)
        with torch.cuda.device(v.device) if v.is_cuda else nullcontext():
            grid, options = plan.scan
            scan_back_kernel[grid](r, w, dout, dstates, dfinal, dinitial, *plan.where, *lengths, **options)
            grid, options = plan.tiles(plan.V)
            values_kernel[grid](r, w, k, dout, dstates, dv, *plan.where, plan.num_sequences, *lengths, **options)
            grid, options = plan.tiles(plan.K)
            keys_kernel[grid](
                r, w, k, v, dout, states, dstates, dr, dw, dk, *plan.where, plan.num_sequences, *lengths,
                RT=plan.numerics.raw, **options,
            )  # fmt: skip
        return None, None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype), dr, dw, dk, dv


def _tile(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))
