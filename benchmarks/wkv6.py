"""wkv6 on one GPU: errors against fp64 at hard decays, times, and candidate settings; compared with fla's gla.

    python3 benchmarks/wkv6.py [--out FILE.json] [--budget SECONDS]

Stops at the budget, by default a minute; results until then are printed and written. Ours come first,
then fla's operator where it can be imported. Everything compiles in parallel processes meanwhile (peers.py). The plain
torch form runs in fp64 only, as the reference, on the few hundred tokens that a row of errors names. Needs the package
importable as `radlads`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from peers import Case, Compilers, search
from torch import Tensor

from radlads.kernels.shared.testing import WKV6_FLOOR, outputs_and_gradients, relative_rms, wkv6_inputs
from radlads.kernels.wkv6.chunked import wkv6_chunked
from radlads.kernels.wkv6.triton_op import Wkv6Tuning, candidates, current_backend, wkv6_triton

BF16 = torch.bfloat16
SHAPES = {"H64 D64": (4, 4096, 64, 64), "H40 D128": (4, 4096, 40, 128), "one long": (1, 32768, 40, 128)}
START = time.time()
MARGIN = 10.0  # seconds of the budget for imports before the start and for the current row at the end


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def gla() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """fla's chunked operator, with this one's arguments."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None

    def operator(r: Tensor, w: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return chunk_gla(r, k, v, w, scale=1.0, **options)

    return operator


def settings() -> list[Wkv6Tuning]:
    """All but the default."""
    return candidates(current_backend())[1:]


def cases() -> list[Case]:
    """Calls of the rows below, on fewer tokens."""

    def run(operator: Callable, B: int, T: int, H: int, D: int, state: bool = False) -> None:
        inputs = wkv6_inputs(B, T, H, D, dtype=BF16, device="cuda")
        if state:
            outputs_and_gradients(operator, inputs, torch.zeros(B, H, D, D, device="cuda").requires_grad_())
        else:
            both(operator, inputs)
            forward(operator, inputs)

    found = []
    for D in (128, 64):
        found.append(Case("default", lambda D=D: run(wkv6_triton, 1, 1024, 2, D), False))
        found.append(Case("default", lambda D=D: run(wkv6_triton, 1, 333, 2, D, True), False))
    for tuning in reversed(settings()):  # the slowest to compile first
        operator = partial(wkv6_triton, tuning=tuning)
        for T, D in ((1024, 128), (200, 128), (1024, 64)):
            found.append(Case("settings", lambda T=T, D=D, o=operator: run(o, 1, T, 2, D), False))
    peer = gla()
    for name, (B, _, H, D) in SHAPES.items() if peer else ():
        found.append(Case(name, lambda B=B, H=H, D=D: run(peer, B, 1024, H, D), True))
    if peer:  # final states make other kernels of some
        inputs = partial(wkv6_inputs, 4, 320, 64, 64, dtype=BF16, device="cuda")
        found.append(Case("fla errors", lambda: outputs_and_gradients(peer, inputs()), True))
    return found


def references() -> dict[tuple, dict[str, Tensor]]:
    """The fp64 results for the rows of `errors`."""
    exact = {}
    for B, T, H, size, log_decay, start in error_rows().values():
        inputs = wkv6_inputs(B, T, H, size, dtype=BF16, device="cuda", log_decay=log_decay)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        state = start_state(B, H, size).double().requires_grad_() if start else None
        exact[B, T, H, size, log_decay, start] = outputs_and_gradients(wkv6_chunked, wide, state)
    return exact


def error_rows() -> dict[str, tuple[int, int, int, int, float | None, bool]]:
    """Name -> B, T, H, D, the decay or None for a spread, and whether there is an initial state."""
    decays = {"random": None, "floor": WKV6_FLOOR, "none": 0.0, "-20": -20.0}
    rows = {f"D={D} {note}": (2, 333, 2, D, w, True) for D in (64, 128) for note, w in decays.items()}
    rows["settings, D=128"] = (1, 200, 2, 128, None, False)
    # heads and head size as in the times, so that fla's kernels have little to search for again
    rows |= {f"H=64 D=64 {note}": (4, 320, 64, 64, w, False) for note, w in decays.items()}
    return rows


def start_state(B: int, H: int, size: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(2)
    return torch.randn(B, H, size, size, device="cuda", generator=generator)


def errors(exact: dict[tuple, dict[str, Tensor]], kind: str, others: dict[str, Callable]) -> Iterator[dict]:
    """Every operator at the rows whose name starts with `kind`."""
    for name, row in error_rows().items():
        if not name.startswith(kind):
            continue
        B, T, H, size, log_decay, start = row
        inputs = wkv6_inputs(B, T, H, size, dtype=BF16, device="cuda", log_decay=log_decay)
        state = start_state(B, H, size).requires_grad_() if start else None
        for label, operator in others.items():
            found = outputs_and_gradients(operator, inputs, state)
            worst = {key: relative_rms(found[key], reference) for key, reference in exact[row].items()}
            yield {"case": f"{name} T={T}, {label}", **worst}


def milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=40, return_mode="median")


@torch.no_grad()
def forward(operator: Callable, inputs: list[Tensor]) -> object:
    return operator(*inputs)


def both(operator: Callable, inputs: list[Tensor]) -> object:
    return torch.autograd.grad(operator(*inputs)[0], inputs, inputs[3])


def times(name: str, others: dict[str, Callable], compilers: Compilers) -> Iterator[dict]:
    B, T, H, D = SHAPES[name]
    inputs = [
        x.detach().repeat(B, T // 4096, 1, 1).requires_grad_()
        for x in wkv6_inputs(1, 4096, H, D, dtype=BF16, device="cuda")
    ]
    for label, operator in others.items():
        both(operator, inputs)  # a search, if any, before the others are stopped
        with compilers.quiet():
            fwd, total = milliseconds(partial(forward, operator, inputs)), milliseconds(partial(both, operator, inputs))
        yield {"case": f"{name} {(B, T, H, D)}, {label}", "fwd": fwd, "both": total}


def rows(compilers: Compilers, deadline: float) -> Iterator[tuple[str, dict]]:
    """(errors or times, row): the default, the other settings, then fla; TimeoutError when it is late."""

    def labelled(section: str, found: Iterator[dict]) -> Iterator[tuple[str, dict]]:
        for row in found:
            yield section, row
            if time.time() > deadline:
                raise TimeoutError

    ours: dict[str, Callable] = {"triton": wkv6_triton}
    exact = references()
    compilers.wait("default", deadline)
    yield from labelled("errors", errors(exact, "D=", ours))
    for name in SHAPES:
        yield from labelled("times", times(name, ours, compilers))
    compilers.wait("settings", deadline)
    operators = {tuple(asdict(tuning).values()): partial(wkv6_triton, tuning=tuning) for tuning in settings()}
    tried = {f"setting {row} {values}": x for row, (values, x) in enumerate(operators.items(), 1)}
    yield from labelled("errors", errors(exact, "settings", tried))
    for name in SHAPES:
        yield from labelled("times", times(name, tried, compilers))
    peer = gla()
    if peer is None:
        say("fla left out: it cannot be imported")
        return
    with search(deadline):
        for name in SHAPES:
            compilers.wait(name, deadline)
            yield from labelled("times", times(name, {"fla chunk_gla": peer}, compilers))
        compilers.wait("fla errors", deadline)
        yield from labelled("errors", errors(exact, "H=64", {**ours, "fla chunk_gla": peer}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=60.0)
    options = parser.parse_args()
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    found: dict = {**versions, "errors": [], "times": []}
    say(" ".join(versions.values()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Compilers(cases) as compilers:
            for section, row in rows(compilers, START + options.budget - MARGIN):
                found[section].append(row)
                say(line(section, row))
                if options.out:
                    options.out.write_text(json.dumps(found, indent=1) + "\n")
    except TimeoutError as error:
        say(f"stopped at the budget: {error}")


def line(section: str, row: dict) -> str:
    if section == "times":
        return f"{row['case']:72s} forward {row['fwd']:6.2f} ms  with backward {row['both']:6.2f} ms"
    return f"{row['case']:48s} " + "  ".join(f"{k} {v:.1e}" for k, v in row.items() if k != "case")


if __name__ == "__main__":
    main()
