"""The gated delta rule in plain torch, parallel inside chunks, with hand-written gradients (derivation: README.md).

Dims: B batch, T time, H heads, K key dim, V value dim, N packed sequences, C chunk, G tiles (chunk slots x heads).

Needs torch, `slots.py` and `triangular.py` only, so that an exported model can carry them. The one Python loop is over
chunks; it carries the state. Everything is computed in fp32 (fp64 for fp64 inputs), whatever the dtype of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from radlads.kernels.shared.slots import Slots, chunk_slots, sum_type, zero_states
from radlads.kernels.shared.triangular import unit_lower_inverse

CHUNK = 64
# Minus infinity minus itself is NaN; exp(-1e4) is zero in every dtype.
_MIN_LOG_DECAY = -1e4


def gated_delta_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTH: Tensor,
    beta_BTH: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """`(out [B,T,H,V] in v's dtype, final state [B or N,H,K,V] fp32 (fp64) or None)`; gradients to all inputs.

    Any decay: only differences of cumulative log decays are exponentiated, which are never positive where the log decay
    is not. chunk: a power of two, halved while half of it holds T.
    """
    dtype = sum_type(v_BTHV)
    B, T, H, _ = k_BTHK.shape
    if initial_state is None:
        initial_state = zero_states(k_BTHK, v_BTHV, cu_seqlens)
    while chunk // 2 >= T:
        chunk //= 2
    slots = chunk_slots(B, T, H, chunk, cu_seqlens)
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH)
    out, final_state = _ChunkedGatedDelta.apply(slots, dtype, initial_state, *inputs)
    return out, (final_state if output_final_state else None)


class _Terms:
    """Quantities of a chunk that do not depend on the state, in the notation of README.md."""

    def __init__(self, slots: Slots, dtype: torch.dtype, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor) -> None:
        # In fp64: after strong decays the sums are large, and weak decays must not be rounded away.
        g = slots.pack(log_decay[..., None], torch.float64).clamp_(min=_MIN_LOG_DECAY).cumsum(1)  # [G,C,1]
        self.enter = g.exp().to(dtype)  # from the state before the chunk to each token
        self.leave = (g[:, -1:] - g).exp().to(dtype)  # from each token to the end of the chunk
        self.through = g[:, -1:].exp().to(dtype)  # [G,1,1], the whole chunk
        self.D = (g - g.mT).tril_().exp_().to(dtype).tril_()  # no exponentials above the diagonal
        self.q, self.k = slots.pack(q, dtype), slots.pack(k, dtype)
        self.beta = slots.pack(beta[..., None], dtype)  # [G,C,1]
        self.P = (self.q @ self.k.mT).mul_(self.D)
        self.N = (self.k @ self.k.mT).mul_(self.D).tril_(-1)
        self.L = self.N * self.beta
        self.T = unit_lower_inverse(-self.L)
        self.read = self.k * self.enter  # reads of the state before the chunk
        self.write = self.k * self.leave
        self.W = self.T @ (self.read * self.beta)


class _ChunkedGatedDelta(torch.autograd.Function):
    """Forward and the hand-written backward, in the notation of README.md."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        slots: Slots,
        dtype: torch.dtype,
        initial_state: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(v.device.type, enabled=False):
            x = _Terms(slots, dtype, q, k, log_decay, beta)
            free = x.T @ slots.pack(v, dtype).mul_(x.beta)  # U where the chunk begins with an empty state
            states, U, state = _scan(slots, x, free, slots.pack_state(initial_state, dtype))
            out = torch.baddbmm(x.P @ U, x.q * x.enter, states)
            ctx.slots, ctx.dtype = slots, dtype
            ctx.save_for_backward(q, k, v, log_decay, beta, initial_state, states, U)
            return slots.unpack(out, v.dtype), slots.unpack_state(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, initial_state, states, U = ctx.saved_tensors
        slots, dtype = ctx.slots, ctx.dtype
        with torch.autocast(v.device.type, enabled=False):
            x = _Terms(slots, dtype, q, k, log_decay, beta)  # recomputed: cheaper than storing it
            dO = slots.pack(dout, dtype)
            own = (x.q * x.enter).mT @ dO
            dstates, dU, dinitial = _scan_back(slots, x, x.P.mT @ dO, own, slots.pack_state(dfinal, dtype))
            X = x.T.mT @ dU
            change = slots.pack(v, dtype) - torch.baddbmm(x.N @ U, x.read, states)  # U = beta ∘ change
            dP, dL = (dO @ U.mT).tril_(), (X @ U.mT).neg_().tril_(-1)
            pairs = dP * x.P + dL * x.L
            dP *= x.D
            dN = dL.mul_(x.D).mul_(x.beta)
            dq_state = (dO @ states.mT).mul_(x.enter)
            dk_read = (X @ states.mT).mul_(x.beta).mul_(x.enter).neg_()
            dk_write = (U @ dstates.mT).mul_(x.leave)
            dq = torch.baddbmm(dq_state, dP, x.k)
            dk = torch.baddbmm(dk_read + dk_write, dP.mT, x.q).baddbmm_(dN + dN.mT, x.k)
            reads = (dq_state * x.q + dk_read * x.k).sum(-1, keepdim=True)
            writes = (dk_write * x.k).sum(-1, keepdim=True)
            passed = (states * dstates).sum((1, 2), keepdim=True).mul_(x.through)
            grads = (
                (dq, q),
                (dk, k),
                (X * x.beta, v),
                (_decay_gradient(pairs, reads, writes, passed), log_decay),
                ((X * change).sum(-1, keepdim=True), beta),
            )
            dinitial = slots.unpack_state(dinitial).to(initial_state.dtype)
            unpacked = (slots.unpack(grad, like.dtype).view(like.shape) for grad, like in grads)
            return None, None, dinitial, *unpacked


def _decay_gradient(pairs_GCC: Tensor, reads_GC1: Tensor, writes_GC1: Tensor, passed_G11: Tensor) -> Tensor:
    """[G,C,1]: for token t, the sum over writes before it that are read at it or later. No cancellation.

    pairs: of a read i and a write j of the chunk; reads: of the state before it; writes: that reach the state after it.
    """
    C = pairs_GCC.shape[1]
    before = torch.ones(C, C, dtype=pairs_GCC.dtype, device=pairs_GCC.device).triu_(1)  # [j,t]: j < t
    across = (pairs_GCC @ before).tril_().sum(1)[..., None]
    from_here = torch.ones_like(before).triu_()  # [t,i]: i ≥ t
    return across + from_here @ reads_GC1 + before.mT @ writes_GC1 + passed_G11


def _scan(slots: Slots, x: _Terms, free_GCV: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk after chunk: (the state before each [G,K,V], U [G,C,V], the last state of every sequence)."""
    G, K, V = x.k.shape[0], x.k.shape[2], free_GCV.shape[2]
    states, U, state = free_GCV.new_empty(G, K, V), torch.empty_like(free_GCV), state.clone()
    for start, count in zip(slots.starts, slots.counts, strict=True):
        here = slice(start, start + count)
        states[here] = state[:count]
        torch.baddbmm(free_GCV[here], x.W[here], states[here], alpha=-1, out=U[here])
        torch.baddbmm(states[here] * x.through[here], x.write[here].mT, U[here], out=state[:count])
    return states, U, state


def _scan_back(
    slots: Slots, x: _Terms, dU_GCV: Tensor, own_GKV: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backwards: (the gradient of the state after each chunk [G,K,V], of U, of the first state of every sequence).

    dU, own: gradients from each chunk's own outputs to U and to the state before it.
    """
    dstates, dU, dstate = torch.empty_like(own_GKV), torch.empty_like(dU_GCV), dstate.clone()
    for start, count in zip(reversed(slots.starts), reversed(slots.counts), strict=True):
        here = slice(start, start + count)
        dstates[here] = dstate[:count]
        torch.baddbmm(dU_GCV[here], x.write[here], dstates[here], out=dU[here])
        kept = torch.addcmul(own_GKV[here], dstates[here], x.through[here])
        torch.baddbmm(kept, x.W[here].mT, dU[here], alpha=-1, out=dstate[:count])
    return dstates, dU, dstate
