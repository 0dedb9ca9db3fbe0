"""The RWKV-7 operator in plain torch, parallel inside chunks, with hand-written gradients (derivation: README.md).

Dims: B batch, T time, H heads, K key dim, V value dim, N packed sequences, C chunk, G tiles (chunk slots x heads).

Needs torch, `slots.py` and `triangular.py` only, so that an exported model can carry them. The one Python loop is over
chunks; it carries the state. Everything is computed in fp32 (fp64 for fp64 inputs), whatever the dtype of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.slots import Slots, chunk_slots, longest_chunk, scan_chunks, sum_type, zero_states
from radlads.kernels.shared.triangular import unit_lower_inverse

CHUNK = 32
# Inside a chunk, reads carry exp(g - m) and writes exp(m - g), with m the cumulative log decay g in the middle.
# Their product must not overflow above the diagonal either, where it is discarded: exp(2 * 34) leaves nine orders.
_MAX_EXPONENT = {torch.float32: 34.0, torch.float64: 300.0}
# Decay stronger than exp(-60) = 1e-26 (fp64: exp(-290)) is clamped to it: minus infinity has no finite inverse.
_MIN_LOG_DECAY = {torch.float32: -60.0, torch.float64: -290.0}


def wkv7_chunked(
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
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`(out [B,T,H,V] in v's dtype, final state [B or N,H,K,V] fp32 (fp64) or None)`; gradients to all inputs.

    `chunk` defaults to the longest one (at most 32 tokens) that this log decay allows; a log decay beyond the trained
    range makes it shorter and the pass slower, down to one token.
    """
    dtype = sum_type(v_BTHV)
    B, T, H, _ = k_BTHK.shape
    if initial_state is None:
        initial_state = zero_states(k_BTHK, v_BTHV, cu_seqlens)
    if chunk is None:
        chunk = _choose_chunk(log_decay_BTHK, T, dtype)
    slots = chunk_slots(B, T, H, chunk, cu_seqlens)
    inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    out, final_state = _ChunkedWkv7.apply(slots, dtype, initial_state, *inputs)
    return out, (final_state if output_final_state else None)


def _choose_chunk(log_decay: Tensor, T: int, dtype: torch.dtype) -> int:
    strongest = min(float(log_decay.detach().abs().max()), -_MIN_LOG_DECAY[dtype])
    return longest_chunk(CHUNK, T, lambda chunk: strongest * (chunk + 1) <= _MAX_EXPONENT[dtype])


class _DeltaTerms:
    """Quantities of a chunk: centred reads Z = [qc; ac] and writes Y = [kc; bc], A = mask * Z Yᵀ, T = (I - Aab)⁻¹."""

    def __init__(
        self, slots: Slots, dtype: torch.dtype, r: Tensor, log_decay: Tensor, k: Tensor, a: Tensor, b: Tensor
    ) -> None:
        w = slots.pack(log_decay, dtype).clamp_(min=_MIN_LOG_DECAY[dtype])
        C = w.shape[1]
        g = w.cumsum(1)
        m = g[:, C // 2 : C // 2 + 1]
        centred = g - m
        self.read_r = centred.exp()  # exp(g - m)
        self.read_a = (centred - w).exp()  # exp(ge - m): the state that a reads has not decayed yet
        self.write = centred.neg_().exp()  # exp(m - g)
        self.enter = m[:, 0].exp()[..., None]  # [G,K,1]: from the state at the start of the chunk to its middle
        self.leave = (g[:, -1] - m[:, 0]).exp()[..., None]  # from the middle to the end
        self.Z = torch.cat([slots.pack(r, dtype).mul_(self.read_r), slots.pack(a, dtype).mul_(self.read_a)], 1)
        self.Y = torch.cat([slots.pack(k, dtype).mul_(self.write), slots.pack(b, dtype).mul_(self.write)], 1)
        lower = torch.ones(C, C, dtype=dtype, device=w.device).tril()
        self.mask = torch.cat([lower.repeat(1, 2), lower.tril(-1).repeat(1, 2)])
        self.A = (self.Z @ self.Y.mT).mul_(self.mask)
        self.T = unit_lower_inverse(self.A[:, C:, C:])
        self.W = self.T @ self.Z[:, C:]
        step = self.Y[:, C:].mT @ self.W
        self.step = step.mul_(self.leave).mul_(self.enter.mT)  # the transition, its decay added below
        self.through = g[:, -1:].exp()  # [G,1,K]: the decay of the whole chunk
        self.step.diagonal(dim1=1, dim2=2).add_(self.through[:, 0])


class _ChunkedWkv7(torch.autograd.Function):
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
        a: Tensor,
        b: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(v.device.type, enabled=False):
            x = _DeltaTerms(slots, dtype, r, log_decay, k, a, b)
            C = slots.C
            v_GCV = slots.pack(v, dtype)
            from_v = x.T @ (x.A[:, C:, :C] @ v_GCV)
            new = (x.Y.mT @ torch.cat([v_GCV, from_v], 1)).mul_(x.leave)
            states, state = _scan(slots, x.step, new, slots.pack_state(initial_state, dtype))
            entered = states * x.enter
            X = torch.cat([v_GCV, torch.baddbmm(from_v, x.W, entered)], 1)
            out = torch.baddbmm(x.A[:, :C] @ X, x.Z[:, :C], entered)
            ctx.slots, ctx.dtype = slots, dtype
            ctx.save_for_backward(r, log_decay, k, v, a, b, initial_state, states, X)
            return slots.unpack(out, v.dtype), slots.unpack_state(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, log_decay, k, v, a, b, initial_state, states, X = ctx.saved_tensors
        slots, dtype, C = ctx.slots, ctx.dtype, ctx.slots.C
        with torch.autocast(v.device.type, enabled=False):
            x = _DeltaTerms(slots, dtype, r, log_decay, k, a, b)  # recomputed: 1/4 time, 1/10 memory
            dO = slots.pack(dout, dtype)
            dU = x.A[:, :C, C:].mT @ dO
            reads = torch.baddbmm(x.W.mT @ dU, x.Z[:, :C].mT, dO).mul_(x.enter)
            dstates, dinitial = _scan_back(slots, x.step, reads, slots.pack_state(dfinal, dtype))
            passed = (states * dstates).sum(-1, keepdim=True).mT * x.through
            left, entered = dstates.mul_(x.leave), states * x.enter
            G = torch.cat([dO, x.T.mT @ dU.baddbmm_(x.Y[:, C:], left)], 1)
            dv = torch.baddbmm(x.A[:, :, :C].mT @ G, x.Y[:, :C], left)
            dA = (G @ X.mT).mul_(x.mask)
            # no decay lies between r and its own token's k and b: computed separately, so that rounding does not reach
            # dw
            same_k = dA[:, :C, :C].diagonal(dim1=1, dim2=2).clone()[..., None]
            same_b = dA[:, :C, C:].diagonal(dim1=1, dim2=2).clone()[..., None]
            dA[:, :C].diagonal(dim1=1, dim2=2).zero_()
            dA[:, :C, C:].diagonal(dim1=1, dim2=2).zero_()
            dZ = torch.baddbmm(dA @ x.Y, G, entered.mT)
            dY = dA.mT @ x.Z
            dY_left = X @ left.mT
            reading, writing, leaving = x.Z * dZ, x.Y * dY, x.Y * dY_left
            lower, strictly_lower = x.mask[:C, :C], x.mask[C:, :C]
            dw = x.mask[:, :C].mT @ reading
            dw -= lower.mT @ (writing[:, :C] + writing[:, C:])
            dw += strictly_lower @ (leaving[:, :C] + leaving[:, C:])
            dw += passed
            dY += dY_left
            q, a_read, k_write, b_write = x.Z[:, :C], dZ[:, C:], dY[:, :C], dY[:, C:]
            grads = (
                dZ[:, :C].addcmul_(same_k, x.Y[:, :C]).addcmul_(same_b, x.Y[:, C:]).mul_(x.read_r),
                dw,
                k_write.addcmul_(same_k, q).mul_(x.write),
                dv,
                a_read.mul_(x.read_a),
                b_write.addcmul_(same_b, q).mul_(x.write),
            )
            dtypes = (y.dtype for y in (r, log_decay, k, v, a, b))
            dinitial = slots.unpack_state(dinitial).to(initial_state.dtype)
            return None, None, dinitial, *(slots.unpack(y, d) for y, d in zip(grads, dtypes, strict=True))


def _scan(slots: Slots, step_GKK: Tensor, new_GKV: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h <- step h + new, chunk after chunk: (the state before every chunk [G,K,V], the last one of every sequence)."""

    def move(here: slice, before: Tensor, after: Tensor) -> None:
        torch.baddbmm(new_GKV[here], step_GKK[here], before, out=after)

    return scan_chunks(slots, new_GKV, state, move, backwards=False)


def _scan_back(slots: Slots, step_GKK: Tensor, reads_GKV: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor]:
    """dh <- stepᵀ dh + reads, backwards: (dh after every chunk [G,K,V], dh at the start of every sequence)."""

    def move(here: slice, before: Tensor, after: Tensor) -> None:
        torch.baddbmm(reads_GKV[here], step_GKK[here].mT, before, out=after)

    return scan_chunks(slots, reads_GKV, dstate, move, backwards=True)
