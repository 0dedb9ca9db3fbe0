"""The RAD-RWKV6 operator in plain torch, parallel inside chunks, with hand-written gradients (derivation: README.md).

Dims: B batch, T time, H heads, K key dim, V value dim, N packed sequences, C chunk, G tiles (chunk slots x heads).

Needs torch and `slots.py` only, so that an exported model can carry both. The one Python loop is over chunks; it
carries the state. Everything is computed in fp32 (fp64 for fp64 inputs), whatever the dtype of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.slots import Slots, chunk_slots, longest_chunk, scan_chunks, sum_type, zero_states

MAX_CHUNK = 64
# Inside a chunk, reads carry exp(g - m) and writes exp(m - g), with m the cumulative log decay g in the middle. Each
# must leave range in the dtype for its other factor: fp32 ends at exp(+-87), and gradients of 1e-18 are common.
_MAX_EXPONENT = {torch.float32: 41.0, torch.float64: 340.0}
# Decay stronger than exp(-41) = 1e-18 is clamped to it: minus infinity has no finite inverse.
_MIN_LOG_DECAY = -41.0


def wkv6_chunked(
    r_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`(out [B,T,H,V] in v's dtype, final state [B or N,H,K,V] fp32 (fp64) or None)`; gradients to all inputs.

    `chunk` defaults to the longest one (at most 64 tokens) that this log decay allows: 16 at RAD-RWKV6's floor of -5,
    fewer beyond it, down to one token.
    """
    dtype = sum_type(v_BTHV)
    B, T, H, _ = k_BTHK.shape
    if initial_state is None:
        initial_state = zero_states(k_BTHK, v_BTHV, cu_seqlens)
    if chunk is None:
        chunk = _choose_chunk(log_decay_BTHK, T, dtype)
    slots = chunk_slots(B, T, H, chunk, cu_seqlens)
    out, final_state = _ChunkedWkv6.apply(slots, dtype, initial_state, r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV)
    return out, (final_state if output_final_state else None)


def _choose_chunk(log_decay: Tensor, T: int, dtype: torch.dtype) -> int:
    strongest = min(float(log_decay.detach().abs().max()), -_MIN_LOG_DECAY)
    return longest_chunk(MAX_CHUNK, T, lambda chunk: strongest * chunk <= _MAX_EXPONENT[dtype])


class _ChunkTerms:
    """Quantities of a chunk: centred reads Z = r exp(g - m) and writes Y = k exp(m - g), and A = tril(Z Yᵀ)."""

    def __init__(self, slots: Slots, dtype: torch.dtype, r: Tensor, log_decay: Tensor, k: Tensor) -> None:
        g = slots.pack(log_decay, dtype).clamp_(min=_MIN_LOG_DECAY).cumsum(1)
        m = g[:, g.shape[1] // 2][:, None]
        self.enter = m.mT.exp()  # [G,K,1]: from the state at the start of the chunk to its middle
        self.leave = (g[:, -1:] - m).mT.exp()  # from the middle to the end
        self.through = g[:, -1:].mT.exp()  # the decay of the whole chunk
        centred = g - m
        self.read = centred.exp()  # [G,C,K]
        self.write = centred.neg_().exp()
        self.Z = slots.pack(r, dtype).mul_(self.read)
        self.Y = slots.pack(k, dtype).mul_(self.write)
        self.A = (self.Z @ self.Y.mT).tril_()  # above the diagonal it may have overflowed: set to zero, not multiplied


class _ChunkedWkv6(torch.autograd.Function):
    """Forward and the hand-written backward, in the notation of README.md."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        slots: Slots,
        dtype: torch.dtype,
        initial_state: Tensor,
        r: Tensor,
        log_decay: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(v.device.type, enabled=False):
            x = _ChunkTerms(slots, dtype, r, log_decay, k)
            v_GCV = slots.pack(v, dtype)
            new = (x.Y.mT @ v_GCV).mul_(x.leave)
            states, state = _scan(slots, x.through, new, slots.pack_state(initial_state, dtype))
            out = torch.baddbmm(x.A @ v_GCV, x.Z, states * x.enter)
            ctx.slots, ctx.dtype = slots, dtype
            ctx.save_for_backward(r, log_decay, k, v, initial_state, states)
            return slots.unpack(out, v.dtype), slots.unpack_state(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, log_decay, k, v, initial_state, states = ctx.saved_tensors
        slots, dtype = ctx.slots, ctx.dtype
        with torch.autocast(v.device.type, enabled=False):
            x = _ChunkTerms(slots, dtype, r, log_decay, k)  # recomputed: cheaper than storing it
            v_GCV, dO = slots.pack(v, dtype), slots.pack(dout, dtype)
            reads = (x.Z.mT @ dO).mul_(x.enter)
            dstates, dinitial = _scan(slots, x.through, reads, slots.pack_state(dfinal, dtype), backwards=True)
            passed = (states * dstates).sum(-1)[:, None] * x.through.mT
            left, entered = dstates.mul_(x.leave), states * x.enter
            dv = torch.baddbmm(x.A.mT @ dO, x.Y, left)
            dA = (dO @ v_GCV.mT).tril_()
            # no decay lies between r and the k of its own token: computed separately, so that its rounding does not
            # reach dw
            same = dA.diagonal(dim1=1, dim2=2).clone()[..., None]
            dA.diagonal(dim1=1, dim2=2).zero_()
            dZ = torch.baddbmm(dA @ x.Y, dO, entered.mT)
            dY = dA.mT @ x.Z
            dY_left = v_GCV @ left.mT
            lower = torch.ones(slots.C, slots.C, dtype=dtype, device=v.device).tril_()
            dw = lower.mT @ (x.Z * dZ) - lower.mT @ (x.Y * dY)
            dw += lower.tril_(-1) @ (x.Y * dY_left)
            dw += passed
            dr = dZ.addcmul_(same, x.Y).mul_(x.read)
            dk = dY.add_(dY_left).addcmul_(same, x.Z).mul_(x.write)
            grads = ((dr, r), (dw, log_decay), (dk, k), (dv, v))
            dinitial = slots.unpack_state(dinitial).to(initial_state.dtype)
            return None, None, dinitial, *(slots.unpack(grad, like.dtype) for grad, like in grads)


def _scan(
    slots: Slots, through_GK1: Tensor, new_GKV: Tensor, state: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """h <- through * h + new, chunk after chunk: (h before each chunk [G,K,V], the last h of every sequence).

    `backwards` visits the chunks from the last to the first.
    """

    def move(here: slice, before: Tensor, after: Tensor) -> None:
        torch.addcmul(new_GKV[here], through_GK1[here], before, out=after)

    return scan_chunks(slots, new_GKV, state, move, backwards=backwards)
