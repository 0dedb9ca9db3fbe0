"""wkv7_operands on one GPU compared with its torch form: milliseconds, and memory kept for the backward pass.

    python benchmarks/mixer_ops.py

Shapes are those of training steps: 7B at 12 × 512 (rad_rwkv7), Reka Flash at 2 × 4096 (hxa079), SmolLM2-135M at
96 × 512.
"""

import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from radlads.kernels.mixer_ops import Residual, wkv7_operands, wkv7_operands_reference

# name → (B, T, G, R, K, level of the values' residual, whether keys have one)
SHAPES = {
    "Qwen2.5-7B, rad_rwkv7": (12, 512, 4, 7, 128, "heads", False),
    "Reka Flash, hxa079": (2, 4096, 8, 8, 96, "kv", True),
    "SmolLM2-135M, rad_rwkv7": (96, 512, 3, 3, 64, "heads", False),
}


def inputs_of(B: int, T: int, G: int, R: int, K: int, level: str, keyed: bool) -> tuple[list[Tensor], list[Residual]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    A = G * R * K
    own = [normal(B, T, G, K), normal(B, T, G, K), normal(B, T, A), normal(B, T, A), normal(A), normal(A)]
    heads = [G * R if level == "heads" else G] + [G] * keyed
    return own, [Residual(normal(B, T, n, K), normal(B, T, n * K), normal(n * K)) for n in heads]


def measure(operator: Callable[..., tuple[Tensor, ...]], shape: tuple) -> tuple[float, float, float]:
    """(ms forward, ms forward and backward, MiB kept after the forward pass beyond inputs and outputs)."""
    own, residuals = inputs_of(*shape)
    options = dict(zip(("values", "keys"), residuals, strict=False)) | {"decay_dtype": torch.bfloat16}
    every = own + [x for residual in residuals for x in residual]
    weights = [torch.randn_like(x) for x in operator(*own, **options)]

    def both() -> None:
        torch.autograd.grad(operator(*own, **options), every, weights)

    def forward() -> None:
        with torch.no_grad():
            operator(*own, **options)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outs = operator(*own, **options)
    kept = torch.cuda.memory_allocated() - before - sum(x.nbytes for x in outs)
    del outs
    times = (triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median") for run in (forward, both))
    return *times, kept / 2**20


def main() -> None:
    """Print the table."""
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", ""]
    lines += ["| shape | form | forward ms | both ms | kept MiB |", "| :-- | :-- | --: | --: | --: |"]
    for name, shape in SHAPES.items():
        for form, operator in (("torch", wkv7_operands_reference), ("triton", wkv7_operands)):
            forward, both, kept = measure(operator, shape)
            lines.append(f"| {name} | {form} | {forward:.3f} | {both:.3f} | {kept:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
