"""wkv6 on one GPU: errors against fp64 at hard decays, times, and the settings worth trying; fla's gla beside it.

    python3 benchmarks/wkv6.py [--out FILE.json]

Under a minute. Needs the package importable as `radlads`; flash-linear-attention is measured where it can be imported.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from radlads.kernels.testing import WKV6_FLOOR, outputs_and_gradients, relative_rms, wkv6_inputs
from radlads.kernels.wkv6.chunked import wkv6_chunked
from radlads.kernels.wkv6.triton_op import candidates, current_backend, wkv6_triton

BF16 = torch.bfloat16
SHAPES = {"H64 D64": (4, 4096, 64, 64), "H40 D128": (4, 4096, 40, 128), "one long": (1, 32768, 40, 128)}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def gla() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """fla's chunked operator, with this one's arguments."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as error:
        say(f"fla left out: {error}")
        return None

    def operator(r: Tensor, w: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return chunk_gla(r, k, v, w, scale=1.0, **options)

    return operator


def errors(others: dict[str, Callable]) -> Iterator[dict]:
    for size in (64, 128):
        for note, log_decay in {"random": None, "floor": WKV6_FLOOR, "none": 0.0, "-20": -20.0}.items():
            inputs = wkv6_inputs(2, 333, 2, size, dtype=BF16, device="cuda", log_decay=log_decay)
            state = torch.randn(2, 2, size, size, device="cuda").requires_grad_()
            wide = [x.detach().double().requires_grad_() for x in inputs]
            exact = outputs_and_gradients(wkv6_chunked, wide, state.detach().double().requires_grad_())
            for name, operator in others.items():
                found = outputs_and_gradients(operator, inputs, state)
                yield {
                    "case": f"D={size} {note}, {name}",
                    **{key: relative_rms(found[key], reference) for key, reference in exact.items()},
                }
    for row, tuning in enumerate(candidates(current_backend())):
        inputs = wkv6_inputs(1, 200, 2, 128, dtype=BF16, device="cuda")
        exact = outputs_and_gradients(wkv6_chunked, [x.detach().double().requires_grad_() for x in inputs])
        found = outputs_and_gradients(wkv6_triton, inputs, tuning=tuning)
        yield {"case": f"setting {row}", **{key: relative_rms(found[key], x) for key, x in exact.items()}}


def milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=40, return_mode="median")


@torch.no_grad()
def forward(operator: Callable, inputs: list[Tensor]) -> object:
    return operator(*inputs)


def both(operator: Callable, inputs: list[Tensor]) -> object:
    return torch.autograd.grad(operator(*inputs)[0], inputs, inputs[3])


def times(others: dict[str, Callable]) -> Iterator[dict]:
    for name, (B, T, H, D) in SHAPES.items():
        inputs = [
            x.detach().repeat(B, T // 4096, 1, 1).requires_grad_()
            for x in wkv6_inputs(1, 4096, H, D, dtype=BF16, device="cuda")
        ]
        runs = {**others}
        for row, tuning in enumerate(candidates(current_backend())[1:], 1):
            runs[f"setting {row} {tuple(asdict(tuning).values())}"] = lambda *x, t=tuning: wkv6_triton(*x, tuning=t)
        for label, operator in runs.items():
            fwd, total = milliseconds(partial(forward, operator, inputs)), milliseconds(partial(both, operator, inputs))
            yield {"case": f"{name} {(B, T, H, D)}, {label}", "fwd": fwd, "both": total}
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    found: dict = {**versions, "errors": [], "times": []}
    say(" ".join(versions.values()))
    peer = gla()
    others: dict[str, Callable] = {"triton": wkv6_triton, **({} if peer is None else {"fla chunk_gla": peer})}
    for row in errors(others):
        found["errors"].append(row)
        say(f"{row['case']:34s} " + "  ".join(f"{k} {v:.1e}" for k, v in row.items() if k != "case"))
    for row in times(others):
        found["times"].append(row)
        say(f"{row['case']:72s} forward {row['fwd']:6.2f} ms  with backward {row['both']:6.2f} ms")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
