"""The operators around the RWKV-7 recurrence on one GPU, Triton compared with torch: milliseconds, and memory kept for
the backward pass beyond inputs and outputs.

    python benchmarks/mixer_ops.py

Shapes are those of training steps: 7B at 12 × 512 (rad_rwkv7, in both of its forms), Reka Flash at 2 × 4096 (hxa079),
SmolLM2-135M at 96 × 512. RMSNorm of several widths beside them, which decides whose
`model/training/fused_modules.py` takes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from torch import Tensor
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from radlads.kernels.mixer_ops import Bonus, GroupNorm, Residual, StockKeys, wkv7_finish, wkv7_operands


@dataclass(frozen=True)
class Shape:
    """values: the level of the first values. hxa079: first keys too, and a bonus. stock: RWKV-7's keys, GroupNorm."""

    B: int
    T: int
    G: int
    R: int
    K: int
    values: str = "heads"
    hxa079: bool = False
    stock: bool = False


SHAPES = {
    "Qwen2.5-7B, rad_rwkv7": Shape(12, 512, 4, 7, 128),
    "Qwen2.5-7B, rad_rwkv7 groupnorm": Shape(12, 512, 4, 7, 128, stock=True),
    "Reka Flash, hxa079": Shape(2, 4096, 8, 8, 96, values="kv", hxa079=True),
    "SmolLM2-135M, rad_rwkv7": Shape(96, 512, 3, 3, 64),
}
NORMS = ((98304, 256), (49152, 576), (24576, 1024), (16384, 2048), (8192, 3584), (8192, 6144))  # tokens, width
Call = tuple[Callable[..., Any], list[Tensor], dict[str, Any]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def operands_of(s: Shape) -> Call:
    """(operator, inputs, options with tensors)."""
    B, T, G, K, A = s.B, s.T, s.G, s.K, s.G * s.R * s.K
    own = [normal(B, T, G, K), normal(B, T, G, K), normal(B, T, A), normal(B, T, A), normal(A), normal(A)]
    heads = G * s.R if s.values == "heads" else G
    options = {"values": Residual(normal(B, T, heads, K), normal(B, T, heads * K), normal(heads * K))}
    options |= {"keys": Residual(normal(B, T, G, K), normal(B, T, G * K), normal(G * K))} if s.hxa079 else {}
    options |= {"stock": StockKeys(normal(A), normal(A))} if s.stock else {}
    return wkv7_operands, own, options


def finish_of(s: Shape) -> Call:
    B, T, H, K = s.B, s.T, s.G * s.R, s.K
    options: dict[str, Any] = {"gate_BTA": normal(B, T, H * K), "scale": 1.0 if s.stock else K**-0.5}
    if s.stock:
        options["norm"] = GroupNorm(normal(H * K), normal(H * K), 1e-5 * K)
    if s.hxa079:
        options["bonus"] = Bonus(*(normal(B, T, H, K) for _ in range(3)), normal(H, K))
    return wkv7_finish, [normal(B, T, H, K)], options


def measure(operator: Callable[..., Any], own: list[Tensor], options: dict[str, Any]) -> tuple[float, float, float]:
    """(ms forward, ms forward and backward, MiB kept after the forward pass beyond inputs and outputs)."""
    given = [x for option in options.values() for x in (option if isinstance(option, tuple) else (option,))]
    every = own + [x for x in given if isinstance(x, Tensor)]

    def outputs() -> list[Tensor]:
        made = operator(*own, **options)
        return [made] if isinstance(made, Tensor) else list(made)

    weights = [torch.randn_like(x) for x in outputs()]

    def both() -> None:
        torch.autograd.grad(outputs(), every, weights)

    def forward() -> None:
        with torch.no_grad():
            outputs()

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outs = outputs()
    kept = torch.cuda.memory_allocated() - before - sum(x.nbytes for x in outs)
    del outs
    times = (triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median") for run in (forward, both))
    return *times, kept / 2**20


def norm_forms(width: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Forms of Llama's RMSNorm: (x, weight) to its output."""
    own = LlamaRMSNorm(width).bfloat16().cuda()
    return {
        "transformers": lambda x, weight: functional_call(own, {"weight": weight}, (x,)),
        "liger-kernel": lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False),
        "torch": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
    }


def main() -> None:
    """Print the table."""
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", ""]
    lines += ["| shape | operator | form | forward ms | both ms | kept MiB |", "| :-- | :-- | :-- | --: | --: | --: |"]
    for name, shape in SHAPES.items():
        for make in (operands_of, finish_of):
            operator, own, options = make(shape)
            for form in ("torch", "triton"):
                forward, both, kept = measure(partial(operator, backend=form), own, options)
                lines.append(f"| {name} | {operator.__name__} | {form} | {forward:.3f} | {both:.3f} | {kept:.0f} |")
    for tokens, width in NORMS:
        for form, norm in norm_forms(width).items():
            forward, both, kept = measure(norm, [normal(tokens, width), normal(width)], {})
            lines.append(f"| {tokens:,} × {width:,} | rms_norm | {form} | {forward:.3f} | {both:.3f} | {kept:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
