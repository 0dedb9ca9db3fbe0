"""A recurrence as one node in a graph of torch.compile, which cannot look into its kernels.

Annotations are no strings here: torch infers the operator's schema from them.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def opaque_operator(name: str, run: Callable[..., Any], values: int) -> Callable[..., Any]:
    """`run(*inputs, initial_state=, output_final_state=, cu_seqlens=)` as an operator of torch, without gradients. Its
    state is an empty tensor where none is asked for. values: the place of v among the inputs; the first of them is as
    wide as keys."""
    # An exported folder has a copy of this file, and a process may load several: each registers its own.
    library = f"radlads_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"

    @torch.library.custom_op(f"{library}::{name}", mutates_args=())
    def operator(
        inputs: list[Tensor],
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, state = run(
            *inputs, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
        )
        return out.contiguous(), out.new_empty(0) if state is None else state.contiguous()

    @operator.register_fake
    def _(
        inputs: list[Tensor],
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(inputs[values], memory_format=torch.contiguous_format)
        if not output_final_state:
            return out, out.new_empty(0)
        rows = out.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (rows, *inputs[0].shape[2:], out.shape[-1])
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        return out, out.new_empty(shape, dtype=wide)

    return operator
