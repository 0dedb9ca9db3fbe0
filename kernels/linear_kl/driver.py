"""The pass over tokens that both losses share: logits and losses per tile, products of the backward per block.

Dims: N tokens, D student width, E teacher width, V vocabulary. A tile is the group of tokens whose logits are in memory
at the same time. A block is the group whose logit gradients are in memory: several tiles, for large backward products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from radlads.kernels.linear_kl.products import HeadGradient, Operand, accumulate_dtype, waiting_dtype
from radlads.kernels.linear_kl.rows import RowLosses, RowSettings, torch_rows
from radlads.kernels.shared.backends import is_hopper
from radlads.kernels.shared.chosen import note_kernel

# Memory for logits and their gradients. On a GPU, this and the gradient of the hidden states fit in 1 GiB.
ARENA_BYTES = {"cpu": 64 << 20, "cuda": 870 << 20}
MAX_BLOCK = 2048  # tokens: larger products are not faster
# Tokens per block for the fused products: the fastest size for the head product; its gradient benefits from more.
FUSED_BLOCK = {"frozen": 1024, "trained": 2048}
PULLED = 1024  # tokens per product of logit gradient and head
_ROUND = 128  # tiles of at least this many tokens are a multiple of it
_LEAST = 16  # minimum tokens of a tile
_PAD = 256  # row length is a multiple of this: alignment for the matrix units and for whole product tiles

Rows = Callable[..., None]


@dataclass(frozen=True)
class Batch:
    """Inputs of both losses; the teacher fields are None for cross entropy alone."""

    hidden: Tensor  # [N,D]
    head: Tensor  # [V,D]
    scale: Tensor  # [N]: normalised weight of each token's gradient
    teacher: Tensor | None = None  # [N,E]
    teacher_head: Tensor | None = None  # [V,E]
    labels: Tensor | None = None  # [N]
    ce_factor: Tensor | None = None  # [N]
    want_hidden: bool = False
    want_head: bool = False
    logits_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Found:
    """Losses of all tokens, and the gradients before multiplication by the incoming scalar."""

    losses: RowLosses
    grad_hidden: Tensor | None
    grad_head: tuple[Tensor, ...]  # row slabs; empty if not requested


def run_batch(batch: Batch, settings: RowSettings) -> Found:
    """Losses per token [N] and the requested gradients of hidden states and head: one pass, at most four products."""
    hidden, teacher = batch.hidden, batch.teacher
    N, V = hidden.shape[0], batch.head.shape[0]
    dtype = accumulate_dtype(hidden) if teacher is None else accumulate_dtype(hidden, teacher)
    ours = Operand(batch.head, hidden.dtype, dtype)
    theirs = None if teacher is None else Operand(batch.teacher_head, teacher.dtype, dtype)
    losses = RowLosses(*(torch.zeros(N, dtype=dtype, device=hidden.device) for _ in RowLosses._fields))
    grad_dtype = ours.grad_dtype if batch.want_hidden or batch.want_head else None
    fused, add_outer = (choose_products(batch) if settings.divergence == "forward" else None) or (None, None)
    form = _form(batch, fused is not None, dtype)
    note_kernel("linear_kl", form, None if fused else partial(_why_slower, batch, settings))
    longest = MAX_BLOCK if fused is None else FUSED_BLOCK["trained" if batch.want_head else "frozen"]
    tiles = _Tiles(
        N, V, hidden.device, torch.float16 if fused else batch.logits_dtype or dtype, grad_dtype,
        alone=theirs is None, longest=longest, powers=fused is not None,
    )  # fmt: skip
    grad_hidden = None
    if batch.want_hidden:
        grad_hidden = torch.empty_like(hidden, dtype=waiting_dtype(hidden, dtype))
    grad_head = HeadGradient(ours, add_outer) if batch.want_head else None
    rows = choose_rows(hidden.device, dtype)

    def fill(here: slice, z: Tensor, y: Tensor | None, grad: Tensor | None) -> None:
        """Write the losses of a tile and the gradient of its logits."""
        labels, factor = (None if x is None else x[here] for x in (batch.labels, batch.ce_factor))
        theirs_here = None if theirs is None else teacher[here]
        losses_here = RowLosses(*(x[here] for x in losses))
        if fused is not None:
            fused(
                hidden[here],
                batch.head,
                theirs_here,
                batch.teacher_head,
                labels,
                factor,
                z,
                y,
                grad,
                settings,
                losses_here,
            )
            return
        ours.logits(hidden[here], z)
        if theirs is not None:
            theirs.logits(theirs_here, y)
        rows(z, y, labels, factor, grad, settings, losses_here)

    def fill_block(start: int, block: list[int]) -> Tensor | None:
        done = 0
        for count in block:
            fill(slice(start + done, start + done + count), *tiles.views(done, count))
            done += count
        return None if grad_dtype is None else tiles.gradients(done)

    with torch.autocast(hidden.device.type, enabled=False):
        start = 0
        for block in tiles.blocks:
            here = slice(start, start + sum(block))
            grad, scale = fill_block(start, block), batch.scale[here, None]
            if grad_hidden is not None:
                for i in range(0, len(grad), PULLED):
                    piece = slice(i, min(i + PULLED, len(grad)))
                    grad_hidden[here][piece] = ours.pull_back(grad[piece]).mul_(scale[piece])
            if grad_head is not None:  # scaled by N meanwhile: hidden / N would underflow in fp16
                grad_head.add(grad, hidden[here] * (scale * N))
            start = here.stop
        grad = tiles.arena = None  # free the arena before the head gradient is cast
        head = () if grad_head is None else grad_head.finish(1 / N, waiting_dtype(batch.head, dtype))
    return Found(losses, grad_hidden, head)


def choose_rows(device: torch.device, dtype: torch.dtype) -> Rows:
    """The fused kernel on a GPU with Triton; plain torch otherwise and for fp64."""
    if device.type != "cuda" or dtype == torch.float64 or find_spec("triton") is None:
        return torch_rows
    from radlads.kernels.linear_kl.triton_rows import triton_rows

    return triton_rows


def choose_products(batch: Batch) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """(product_rows, add_outer) on NVIDIA Hopper, unless `logits_dtype` is set or the operands are unsupported; None:
    use the library's products and `choose_rows`."""
    device = batch.hidden.device
    if device.type != "cuda" or not is_hopper(device) or batch.logits_dtype is not None or find_spec("triton") is None:
        return None
    from radlads.kernels.linear_kl.triton_outer import add_outer
    from radlads.kernels.linear_kl.triton_product import product_rows, takes

    pairs = [(batch.hidden, batch.head)]
    if batch.teacher is not None:
        pairs.append((batch.teacher, batch.teacher_head))
    return (product_rows, add_outer) if all(takes(*pair) for pair in pairs) else None


def _form(batch: Batch, fused: bool, dtype: torch.dtype) -> str:
    if fused:
        return "triton, products that sum their rows"
    rows = "plain torch" if choose_rows(batch.hidden.device, dtype) is torch_rows else "triton"
    return f"library products, rows by {rows}"


def _why_slower(batch: Batch, settings: RowSettings) -> str:
    """Why this batch does not use the fused products."""
    device = batch.hidden.device
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not is_hopper(device):
        return "the GPU is not Hopper"
    if settings.divergence != "forward":
        return "of the divergences the fused products compute forward KL alone: they do not keep the teacher's logits"
    if batch.logits_dtype is not None:
        return "logits_dtype is set"
    return f"the fused products do not support {batch.hidden.dtype} operands or this alignment"


class _Tiles:
    """The arena of a block: logit gradients fill it from the start, the logits of the current tile follow them.

    The student's logits and their gradient share memory if their dtypes have the same size. A block has at most
    `longest` tokens. With `powers`, a tile has 2^i tokens, so that its products fill the GPU.
    """

    def __init__(
        self,
        N: int,
        V: int,
        device: torch.device,
        logits: torch.dtype,
        grad: torch.dtype | None,
        alone: bool = False,
        longest: int = MAX_BLOCK,
        powers: bool = False,
    ) -> None:
        self.V, self.width = V, V if device.type == "cpu" else -(-V // _PAD) * _PAD
        self.logits_dtype, self.grad_dtype, self.alone = logits, grad, alone
        self.kept = 0 if grad is None else grad.itemsize
        self.shared = self.kept == logits.itemsize
        self.passing = logits.itemsize * ((0 if self.shared else 1) + (0 if alone else 1))
        self.longest, self.powers = longest, powers
        budget = ARENA_BYTES["cpu" if device.type == "cpu" else "cuda"] // self.width
        self.blocks = self._plan(N, budget)
        rows = max((self._bytes(block) for block in self.blocks), default=0)
        self.arena = torch.empty(rows * self.width, dtype=torch.uint8, device=device)

    def _plan(self, N: int, budget: int) -> list[list[int]]:
        """Tile sizes of each block, each as large as the remaining memory allows."""
        first = self._round(budget // (self.kept + self.passing))
        blocks: list[list[int]] = []
        while N > 0:
            block: list[int] = []
            room = min(N, self.longest) if self.kept else min(N, self.longest, first)
            while room > 0:
                tokens_left = (budget - sum(block) * self.kept) // (self.kept + self.passing)
                if block and tokens_left < max(_LEAST, first // 2):
                    break
                block.append(min(self._round(tokens_left), room))
                room -= block[-1]
            blocks.append(block)
            N -= sum(block)
        return blocks

    def _round(self, tile: int) -> int:
        if tile < _ROUND:
            return max(_LEAST, tile)
        return 1 << (tile.bit_length() - 1) if self.powers else tile // _ROUND * _ROUND

    def _bytes(self, block: list[int]) -> int:
        """Bytes of a block per entry of a row of logits."""
        ends = [sum(block[: i + 1]) for i in range(len(block))]
        return max(end * self.kept + tile * self.passing for end, tile in zip(ends, block, strict=True))

    def views(self, offset: int, count: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Student logits, teacher logits and logit gradient, each [count,V], of the tile after `offset` tokens."""
        start = offset * self.kept
        grad = None if self.grad_dtype is None else self._rows(start, count, self.grad_dtype)
        place = start + count * self.kept
        z = self._rows(start if self.shared else place, count, self.logits_dtype)
        place += 0 if self.shared else count * self.logits_dtype.itemsize
        return z, None if self.alone else self._rows(place, count, self.logits_dtype), grad

    def gradients(self, count: int) -> Tensor:
        """Logit gradients of the first `count` tokens of the block, [count,V]."""
        return self._rows(0, count, self.grad_dtype)

    def _rows(self, place: int, count: int, dtype: torch.dtype) -> Tensor:
        start = place * self.width
        rows = self.arena[start : start + count * self.width * dtype.itemsize].view(dtype)
        return rows.view(count, self.width)[:, : self.V]
