"""Sizes of the launches of kernels/inference by measurement: every choice for the products of a decoding step, beside
torch's.

    python3 benchmarks/inference_tiles.py [--rows 1 8] [--out FILE]

Each line: rows, what is multiplied, microseconds of torch, of the default, of the best sizes, and those sizes. Weights
are read from several copies in turn, so that no cache holds them; calls are replayed as one CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from triton.testing import do_bench_cudagraph

from radlads.kernels.inference import triton_linear as kernels
from radlads.kernels.inference.triton_low_rank import low_rank_pairs_triton

say = logging.getLogger("inference_tiles").info
# name: width in, widths out
PRODUCTS = {
    "1.7B q k v": (2048, (2048, 1024, 1024)),
    "1.7B o": (2048, (2048,)),
    "1.7B down": (6144, (2048,)),
    "1.7B gate up": (2048, (6144,)),
    "135M q k v": (576, (576, 192, 192)),
    "135M gate up": (576, (1536,)),
    "135M down": (1536, (576,)),
}
LOW_RANK = {"1.7B low rank": (2048, 2048, (96, 96, 64, 256)), "135M low rank": (576, 576, (64, 64, 32, 96))}
_MILLISECONDS, _COPIED_BYTES, _MOST_COPIES = 2, 160e6, 40


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call, of a graph of many."""
    found: float = do_bench_cudagraph(call, rep=_MILLISECONDS)
    return found * 1e3


def choices(rows: int) -> list[dict[str, int]]:
    """Sizes to try."""
    if rows == 1:
        tried = itertools.product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8))
        return [
            {"N": 1, "BN": 1, "BO": o, "BK": k, "num_warps": w, "num_stages": 3}
            for o, k, w in tried
            if 256 * w <= o * k <= 16384
        ]
    tried_more = itertools.product((16, 32), (128, 256, 512), (2, 4, 8), (3, 5))
    return [
        {"N": rows, "BN": 16, "BO": o, "BK": k, "num_warps": w, "num_stages": s}
        for o, k, w, s in tried_more
        if o * k * s * 2 <= 160_000
    ]


def normal(*shape: int) -> Tensor:
    """Random bf16."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def measure(name: str, rows: int) -> str:
    """A line of the table."""
    width, outs = PRODUCTS[name]
    gated = "gate" in name
    size = sum(outs) * width * 2 * (1 + gated)
    copies = min(_MOST_COPIES, max(1, int(_COPIED_BYTES // size)))
    weights = itertools.cycle([[normal(out, width) for out in (*outs, *outs * gated)] for _ in range(copies)])
    x, none = normal(rows, 1, width), [None] * len(outs)

    def by_torch() -> None:
        made = [linear(x, one) for one in next(weights)]
        if gated:
            silu(made[0]) * made[1]

    def by_ours() -> None:
        if gated:
            kernels.gated_linear_triton(x, *next(weights))
        else:
            kernels.linear_together_triton([x] * len(outs), next(weights), none)

    default, plain, own = kernels.tiles_of, microseconds(by_torch), microseconds(by_ours)
    tried = []
    for sizes in choices(rows):
        kernels.tiles_of = lambda *_, sizes=sizes, **__: sizes
        tried.append((microseconds(by_ours), sizes))
    kernels.tiles_of = default
    best, sizes = min(tried, key=lambda one: one[0])
    told = ", ".join(f"{key} {sizes[key]}" for key in ("BO", "BK", "num_warps", "num_stages"))
    return f"| {rows} | {name} | {plain:.1f} | {own:.1f} | {best:.1f} | {told} |"


def measure_low_rank(name: str, rows: int) -> str:
    """Likewise, of four low-rank pairs."""
    width, out, ranks = LOW_RANK[name]
    firsts, seconds = [normal(width, rank) for rank in ranks], [normal(rank, out) for rank in ranks]
    x = normal(rows, 1, width)
    plain = microseconds(lambda: [x @ one @ two for one, two in zip(firsts, seconds, strict=True)])
    own = microseconds(lambda: low_rank_pairs_triton([x] * 4, firsts, seconds, ("tanh", None, None, "sigmoid")))
    return f"| {rows} | {name} | {plain:.1f} | {own:.1f} | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    lines = ["| rows | product | torch µs | default | best | its sizes |", "|--:|---|--:|--:|--:|---|"]
    for rows in options.rows:
        for run, names in ((measure, PRODUCTS), (measure_low_rank, LOW_RANK)):
            for name in names:
                lines.append(run(name, rows))
                say(lines[-1])
    if options.out is not None:
        options.out.write_text(f"{torch.cuda.get_device_name()}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
