"""Decoding on one GPU, in a graph: one token per sequence, compared with fla and with a lower bound.

    python3 benchmarks/decode.py [--out FILE.json] [--batch 64] [--heads 40] [--size 128]

Median µs of a step in graphs of 20, replayed alternately. The lower bound multiplies the state in place: it reads and
writes it once, as every step must. fla's candidates compile in parallel processes first (peers.py), then it searches.
Needs the package importable as `radlads`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from linear_kl import in_turns, say
from peers import Case, Compilers, search

from radlads.kernels.shared.testing import relative_rms, wkv7_inputs
from radlads.kernels.wkv7 import wkv7_delta_step, wkv7_step

STEPS, ROUNDS = 20, 25


def draw(B: int, H: int, D: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs = [x.detach()[:, 0].contiguous() for x in wkv7_inputs(B, 1, H, D, dtype=torch.bfloat16, device="cuda")]
    named = dict(zip(("r", "w", "k", "v", "a", "b"), inputs, strict=True))
    named["kk"], named["iclr"] = -named["a"], torch.rand_like(named["a"])
    named["b"] = named["kk"] * named["iclr"]
    return named, torch.randn(B, H, D, D, device="cuda") * 0.1


def peers(x: dict[str, torch.Tensor], state: torch.Tensor) -> dict[str, Callable[[], tuple]]:
    """fla's decode operators on the same inputs; the state that they return is another tensor."""
    from fla.ops.rwkv7.fused_recurrent import fused_mul_recurrent_rwkv7, fused_recurrent_rwkv7

    y = {name: value[:, None] for name, value in x.items()}
    keywords = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    shared = (y["r"], y["w"], y["k"], y["v"])
    return {
        "fla fused_mul_recurrent_rwkv7 (kk, iclr)": lambda: fused_mul_recurrent_rwkv7(
            *shared, y["kk"], y["iclr"], **keywords
        ),
        "fla fused_recurrent_rwkv7 (a, b)": lambda: fused_recurrent_rwkv7(*shared, y["a"], y["b"], **keywords),
    }


def cases() -> list[Case]:
    """Calls for the compiling processes: they read the shape from the command line as this one does."""
    options = arguments()
    x, state = draw(options.batch, options.heads, options.size)
    return [Case(name, run, searched=True) for name, run in peers(x, state).items()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--size", type=int, default=128)
    return parser.parse_args()


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            run()
    return graph


def main() -> None:
    options = arguments()
    B, H, D = options.batch, options.heads, options.size
    x, state = draw(B, H, D)
    runs: dict[str, Callable[[], object]] = {
        "the state times a number, in place": lambda: state.mul_(0.999),
        "wkv7_step (a, b)": lambda: wkv7_step(x["r"], x["w"], x["k"], x["v"], x["a"], x["b"], state),
        "wkv7_delta_step (kk, iclr)": lambda: wkv7_delta_step(
            x["r"], x["w"], x["k"], x["v"], x["kk"], x["iclr"], state
        ),
    }
    apart = {}
    try:
        beside = peers(x, state)
    except ImportError as error:
        say(f"fla left out: {error}")
    else:
        with Compilers(cases) as compilers:
            for name in beside:
                compilers.wait(name)
        with search():
            for name, run in beside.items():
                theirs = run()[0]
                apart[name] = relative_rms(wkv7_step(*(x[n] for n in "rwkvab"), state.clone()), theirs[:, 0])
        runs |= beside
    graphs = {name: captured(run) for name, run in runs.items()}
    medians = {
        name: ms / STEPS * 1e3 for name, ms in in_turns({n: g.replay for n, g in graphs.items()}, ROUNDS).items()
    }
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    say(" ".join(versions.values()) + f"   {B} sequences, {H} heads of {D}")
    for name, us in medians.items():
        distance = f"  outputs {apart[name]:.1e} from ours" if name in apart else ""
        say(f"{name:42s} {us:7.1f} us{distance}")
    if options.out:
        found = {**versions, "shape": [B, H, D], "us": medians, "apart": apart}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
