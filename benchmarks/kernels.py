"""Benchmark of all kernels on one GPU: every setting checked and timed, with other libraries, in a few minutes.

    python3 benchmarks/kernels.py [--out DIR] [--sections sweep,table,...] [--budget SECONDS]

Writes `kernels_<gpu>.md` and the raw rows as JSONL. Sections: `sweep` (every candidate of triton_tuning.py: errors
against fp64 and the time of each kernel), `table` (the operator at the important shapes), `errors` (dtypes, ragged
and packed sequences, repeated keys), `step` (decoding; decode.py compares it with fla), `kl` (linear_kl.py),
`torch` (the chunked form), `sdpa`, `fla` (flash-linear-attention, if it can be imported, and ours at the same shapes:
peers.py makes its search short enough; alone it takes `--sections fla --budget 200`, each shape's rows as soon as they
are known).

Needs the package importable as `radlads`. Settings compile in parallel processes first; the sections run in a child
process that may crash (a bad setting can destroy the CUDA context) and is then restarted after the fatal row.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import linear_kl as linear_losses
import torch
import triton
from peers import WORKERS, Case, Compilers, die_with_parent, search
from torch import Tensor

from radlads.kernels.shared.testing import DECAY_FLOOR, outputs_and_gradients, relative_rms, wkv7_inputs
from radlads.kernels.wkv7.chunked import wkv7_chunked
from radlads.kernels.wkv7.triton_op import wkv7_triton
from radlads.kernels.wkv7.triton_step import wkv7_step_triton
from radlads.kernels.wkv7.triton_tuning import (
    FEWEST_HEADS,
    Fused,
    Wkv7Tuning,
    candidates,
    default_tuning,
    fused_candidates,
    fused_tuning,
)

SHAPES = {"S1": (8, 4096, 64, 64), "S2": (1, 32768, 64, 64), "S3": (4, 4096, 64, 96), "S4": (4, 4096, 40, 128)}
SECTIONS = ("table", "errors", "sweep", "step", "kl", "sdpa", "torch", "fla")
BF16 = torch.bfloat16
DEVICE = "cuda"
START = time.time()


def say(*words: object) -> None:
    sys.stdout.write(f"[{time.time() - START:6.1f}s] " + " ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def sweep_rows() -> Iterator[tuple[str, int, Wkv7Tuning | Fused]]:
    """(shape, row, setting): the fused kernels' settings, then those of the kernels with chunks in parallel."""
    backend = "hip" if torch.version.hip else "cuda"
    for shape in ("S1", "S4", "S3"):
        D = SHAPES[shape][3]
        for row, tuning in enumerate([*fused_candidates(D, D, backend), *candidates(D, D, backend)[:4]]):
            yield shape, row, tuning


def fused(D: int, dtype: torch.dtype = BF16) -> Fused | None:
    return fused_tuning(D, D, FEWEST_HEADS, dtype, "hip" if torch.version.hip else "cuda")


def compile_jobs() -> list[Callable[[], None]]:
    """One job per setting and variant: run on a tiny input, it leaves the compiled kernels in Triton's cache."""

    def run(D: int, T: int, tuning: Wkv7Tuning | Fused | None, bounds: list[int] | None = None, dtype=BF16, h0=False):
        inputs = wkv7_inputs(1, T, 2, D, dtype=dtype, device=DEVICE)
        cu_seqlens = None if bounds is None else torch.tensor(bounds, device=DEVICE)
        state = torch.zeros(1 if bounds is None else len(bounds) - 1, 2, D, D, device=DEVICE) if h0 else None
        options = {"cu_seqlens": cu_seqlens, "tuning": tuning}
        out, _ = wkv7_triton(*inputs, initial_state=state, **options)
        out.sum().backward()
        with torch.no_grad():
            wkv7_triton(*inputs, initial_state=state, **options)

    jobs = []
    for D in (64, 128, 96, 16):
        for tuning in (fused(D), None):
            jobs += [lambda D=D, t=tuning: run(D, 128, t), lambda D=D, t=tuning: run(D, 100, t, h0=True)]
            jobs += [lambda D=D, t=tuning: run(D, 100, t, [0, 30, 100], h0=True)]
    jobs += [lambda: run(64, 100, fused(64), [0, 30, 100])]
    jobs += [lambda: run(64, 100, fused(64, torch.float16), dtype=torch.float16, h0=True)]
    jobs += [lambda: run(64, 100, None, dtype=torch.float32, h0=True)]
    seen = set()
    for shape, _, tuning in sweep_rows():
        D = SHAPES[shape][3]
        if (D, tuning) not in seen:
            seen.add((D, tuning))
            jobs.append(lambda D=D, tuning=tuning: run(D, 128, tuning))
            jobs.append(lambda D=D, tuning=tuning: run(D, 100, tuning))
    return jobs


def worker(index: int, count: int) -> None:
    for job in compile_jobs()[index::count]:
        try:
            job()
        except (RuntimeError, triton.CompilationError, triton.OutOfResources) as error:
            say("compile:", type(error).__name__, str(error)[:160].replace("\n", " "))


def milliseconds(run: Callable[[], object], rep: int = 60) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=rep, return_mode="median")


def kernel_times(run: Callable[[], object], steps: int = 4) -> dict[str, float]:
    """Milliseconds of each of our kernels in one call of `run`."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / steps / 1e3 for event in profile.key_averages()}
    return {name.removesuffix("_kernel"): ms for name, ms in found.items() if name.endswith("_kernel") and ms}


def forward_backward(
    operator: Callable[..., tuple[Tensor, object]], inputs: list[Tensor], **options
) -> Callable[[], object]:
    dout = torch.randn_like(inputs[3])

    def run() -> object:
        return torch.autograd.grad(operator(*inputs, **options)[0], inputs, dout)

    return run


def timing_inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Inputs of this shape made of one random piece repeated: the time does not depend on the values."""
    B, T, H, D = shape
    piece = min(T, 4096)
    inputs = wkv7_inputs(1, piece, H, D, dtype=BF16, device=DEVICE)
    return [x.detach().repeat(B, T // piece, 1, 1).requires_grad_() for x in inputs]


def costs(operator: Callable[..., tuple[Tensor, object]], inputs: list[Tensor], **options) -> dict[str, float]:
    """Milliseconds of a forward pass alone and of both passes, and the peak memory beyond the inputs."""
    both = forward_backward(operator, inputs, **options)
    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30

    def forward() -> None:
        with torch.no_grad():
            operator(*inputs, **options)

    return {"fwd": milliseconds(forward), "both": milliseconds(both), "gib": peak}


def ragged_bounds() -> list[int]:
    """Bounds of 24 sequences of 200 to 2600 tokens and a rest, 32768 together."""
    bounds = [0]
    generator = torch.Generator().manual_seed(3)
    while len(bounds) < 24:
        bounds.append(min(32768 - 24, bounds[-1] + int(torch.randint(200, 2600, (1,), generator=generator))))
    return [*bounds, 32768]


def errors_against(exact: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_rms(ours[name], reference) for name, reference in exact.items()}


def exactly(inputs: list[Tensor], state: Tensor | None = None, **options) -> dict[str, Tensor]:
    wide = None if state is None else state.detach().double().requires_grad_()
    return outputs_and_gradients(wkv7_chunked, [x.detach().double().requires_grad_() for x in inputs], wide, **options)


def sweep(emit: Callable[..., None], done: set[str]) -> None:
    exact = {}
    for shape, row, tuning in sweep_rows():
        name = f"{shape} {row} {tuning}"
        if name in done:
            continue
        B, T, H, D = SHAPES[shape]
        emit(begin=name)
        worst = {}
        for case, special in (("random", {}), ("repeat1", {"period": 1, "iclr": 0.98, "log_decay": -1e-3})):
            inputs = wkv7_inputs(1, 100, 2, D, dtype=BF16, device=DEVICE, **special)
            if (D, case) not in exact:
                exact[D, case] = exactly(inputs)
            try:
                ours = outputs_and_gradients(wkv7_triton, inputs, tuning=tuning)
            except (RuntimeError, triton.CompilationError, triton.OutOfResources) as error:
                emit(row=name, failed=f"{type(error).__name__}: {error}"[:200])
                break
            worst[case] = max(errors_against(exact[D, case], ours).values())
        if "repeat1" not in worst:
            continue
        times = kernel_times(forward_backward(wkv7_triton, timing_inputs((B, T, H, D)), tuning=tuning))
        emit(case=name, worst_error=worst, total=sum(times.values()), ms=times)


def table(emit: Callable[..., None], done: set[str]) -> None:
    cases = [(name, shape, None) for name, shape in SHAPES.items()]
    cases += [("24 ragged", (1, 32768, 64, 64), ragged_bounds()), ("T = 131072", (1, 131072, 64, 64), None)]
    for name, (B, T, H, D), packed in cases:
        if name in done:
            continue
        emit(begin=name)
        torch.cuda.empty_cache()
        cu_seqlens = None if packed is None else torch.tensor(packed, device=DEVICE)
        inputs = timing_inputs((B, T, H, D))
        both = forward_backward(wkv7_triton, inputs, cu_seqlens=cu_seqlens)
        cost = costs(wkv7_triton, inputs, cu_seqlens=cu_seqlens)
        emit(case=name, shape=[B, T, H, D], **cost, ms=kernel_times(both))
        backend = "hip" if torch.version.hip else "cuda"
        sequences = B if packed is None else len(packed) - 1
        if fused_tuning(D, D, H * sequences, BF16, backend) is None:
            other, tuning = "fused", fused(D)
        else:
            other, tuning = "chunks in parallel", default_tuning(D, D, backend)
        run = forward_backward(wkv7_triton, inputs, cu_seqlens=cu_seqlens, tuning=tuning)
        emit(case=f"{name}, by the other kernels: {other}", both=milliseconds(run), ms=kernel_times(run))


def errors(emit: Callable[..., None], done: set[str]) -> None:
    repeated = {"iclr": 0.98, "log_decay": -1e-3}
    cases = [(f"D={D} {note}", D, 333, BF16, special, None) for D in (64, 96, 128, 16) for note, special in (
        ("random", {}), ("one key", {"period": 1, **repeated}), ("four keys", {"period": 4, **repeated}),
        ("decay floor", {"log_decay": -0.6065}))]  # fmt: skip
    cases += [(f"D={D} packed", D, 333, BF16, {}, [0, 0, 1, 65, 65, 200, 333]) for D in (64, 96, 128)]
    cases += [(f"D=64 {dtype}", 64, 333, dtype, {}, None) for dtype in (torch.float16, torch.float32)]
    for name, D, T, dtype, special, bounds in cases:
        if name in done:
            continue
        emit(begin=name)
        inputs = wkv7_inputs(1, T, 2, D, dtype=dtype, device=DEVICE, **special)
        cu_seqlens = None if bounds is None else torch.tensor(bounds, device=DEVICE)
        state = torch.randn(1 if bounds is None else len(bounds) - 1, 2, D, D, device=DEVICE).requires_grad_()
        exact = exactly(inputs, state, cu_seqlens=cu_seqlens)
        for form, tuning in (("fused", fused(D, dtype)), ("chunks in parallel", None)):
            if form == "fused" and tuning is None:
                continue
            ours = outputs_and_gradients(wkv7_triton, inputs, state, cu_seqlens=cu_seqlens, tuning=tuning)
            emit(case=f"{name}, {form}", errors=errors_against(exact, ours))


def step(emit: Callable[..., None], done: set[str]) -> None:
    for B, H, D in ((1, 64, 64), (64, 64, 64), (256, 64, 64), (1, 40, 128), (64, 40, 128), (64, 64, 96)):
        inputs = [x.detach()[:, 0].contiguous() for x in wkv7_inputs(B, 1, H, D, dtype=BF16, device=DEVICE)]
        state = torch.randn(B, H, D, D, device=DEVICE)
        floor = 2 * state.numel() * 4 / 3.0e12 * 1e6
        for values, warps in ((64, 4), (64, 2), (32, 1), (32, 2), (32, 4), (16, 1), (16, 2), (128, 8), (128, 4)):
            name = f"B={B} H={H} D={D} tile {values} warps {warps}"
            if name in done or values > max(64, D):
                continue
            emit(begin=name)

            def run(values=values, warps=warps, inputs=inputs, state=state) -> Tensor:
                return wkv7_step_triton(*inputs, state, values=values, warps=warps)

            emit(case=name, key=[B, H, D], us=triton.testing.do_bench_cudagraph(run, rep=20) * 1e3, floor=floor)


def kl(emit: Callable[..., None], done: set[str]) -> None:
    for name, rows in (("errors", linear_losses.errors()), ("losses", linear_losses.losses(16384, 4096, 152064))):
        if name in done:
            continue
        emit(begin=name)
        for row in rows:
            emit(**row)


def sdpa(emit: Callable[..., None], done: set[str]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for shape, (B, T, H, D) in SHAPES.items():
        if shape == "S2":
            continue
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            name = f"{shape} {backend.name}"
            if name in done:
                continue
            emit(begin=name)
            inputs = [torch.randn(B, H, T, D, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(3)]
            dout = torch.randn_like(inputs[0])

            def run(inputs=inputs, dout=dout) -> object:
                out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
                return torch.autograd.grad(out, inputs, dout)

            with sdpa_kernel(backend):
                emit(case=name, both=milliseconds(run))


def torch_form(emit: Callable[..., None], done: set[str]) -> None:
    inputs = wkv7_inputs(1, 4096, 64, 64, dtype=BF16, device=DEVICE)
    for chunk in (32, 64):
        emit(
            case=f"chunked torch, B1 T4096 H64 D64, chunk {chunk}",
            both=milliseconds(forward_backward(wkv7_chunked, inputs, chunk=chunk)),
        )
    both = milliseconds(forward_backward(wkv7_triton, inputs))
    emit(case="triton, the same", both=both)


def peer_shapes() -> list[tuple[str, tuple[int, int, int, int], list[int] | None]]:
    """(row, shape, bounds of packed sequences), the most important first."""
    rows = [(name, SHAPES[name], None) for name in ("S1", "S2", "S3", "S4")]
    return [*rows[:2], ("24 ragged", SHAPES["S2"], ragged_bounds()), *rows[2:]]


def peer_options() -> list[tuple[str, dict[str, object]]]:
    """fla's modes, in its tensor-core form, which this range of decays permits."""
    options = {"scale": 1.0, "safe_gate": True, "lower_bound": DECAY_FLOOR, "chunk_size": 64}
    return [(f"cs64{' recompute' * again}", {**options, "disable_recompute": not again}) for again in (False, True)]


def peer_case(H: int, D: int, packed: list[int] | None) -> str:
    """fla compiles for heads, head size and packing, whatever the batch and the length."""
    return f"fla H={H} D={D}{' packed' * (packed is not None)}"


def peer_cases() -> list[Case]:
    """Calls of the section `fla`, on few tokens: ours with the settings of each shape, fla with all candidates."""
    from fla.ops.rwkv7 import chunk_rwkv7

    def run(operator: Callable, B: int, H: int, D: int, packed: list[int] | None, **options) -> None:
        inputs = wkv7_inputs(B, 1024, H, D, dtype=BF16, device=DEVICE)
        if packed is not None:  # as many sequences: our choice of kernels depends on it
            options["cu_seqlens"] = torch.linspace(0, 1024, len(packed), device=DEVICE).long()
        forward_backward(operator, inputs, **options)()
        with torch.no_grad():
            operator(*inputs, **options)

    cases = []
    for _, (B, _, H, D), packed in peer_shapes():
        cases.append(Case("ours", lambda B=B, H=H, D=D, p=packed: run(wkv7_triton, B, H, D, p), False))
    for _, (_, _, H, D), packed in peer_shapes():
        name, options = peer_case(H, D, packed), peer_options()[0][1]
        if name not in {case.name for case in cases}:
            cases.append(Case(name, lambda H=H, D=D, p=packed, o=options: run(chunk_rwkv7, 1, H, D, p, **o), True))
    return cases


def fla(emit: Callable[..., None], done: set[str]) -> None:
    """fla's operator in each of its modes, then ours on the same inputs; a search of its own for every shape."""
    try:
        import fla.ops.rwkv7  # noqa: F401
    except ImportError as error:
        emit(case="fla is not importable", note=str(error)[:100])
        return
    with Compilers(peer_cases) as compilers:
        for name, shape, packed in peer_shapes():
            if name in done:
                continue
            emit(begin=name)
            torch.cuda.empty_cache()
            compilers.wait(peer_case(*shape[2:], packed))
            say("fla compiled for", name)
            try:
                peer_rows(name, shape, packed, compilers, partial(emit, shape=list(shape)))
            except (triton.CompilationError, triton.OutOfResources) as error:
                emit(case=name, failed=f"{type(error).__name__}: {error}"[:200])


def peer_rows(
    name: str,
    shape: tuple[int, int, int, int],
    packed: list[int] | None,
    compilers: Compilers,
    emit: Callable[..., None],
) -> None:
    """The rows of one shape: each mode of fla, then ours, on the same inputs, while nothing compiles."""
    import fla as library
    from fla.ops.rwkv7 import chunk_rwkv7

    inputs = timing_inputs(shape)
    where = {} if packed is None else {"cu_seqlens": torch.tensor(packed, device=DEVICE)}
    modes = {mode: {**options, **where} for mode, options in peer_options()}
    begin = time.time()
    with search():
        for options in modes.values():
            forward_backward(chunk_rwkv7, inputs, **options)()
    say(f"fla searched for {time.time() - begin:.0f} s")
    forward_backward(wkv7_triton, inputs, **where)()
    with torch.no_grad():
        found = chunk_rwkv7(*inputs, **next(iter(modes.values())))[0][:, :512]
        apart = relative_rms(found, wkv7_triton(*inputs, **where)[0][:, :512])
    del found
    rows = []
    with compilers.quiet():
        for mode, options in modes.items():
            rows.append(costs(chunk_rwkv7, inputs, **options))
            emit(case=f"{name} fla {library.__version__} chunk_rwkv7 {mode}", **rows[-1])
        ours = costs(wkv7_triton, inputs, **where)
        times = {key: min(row[key] for row in rows) / ours[key] for key in ("fwd", "both")}
        emit(case=f"{name} ours", **ours, fla_takes=times, out_apart=apart)


RUN = {
    "sweep": sweep,
    "table": table,
    "errors": errors,
    "step": step,
    "kl": kl,
    "sdpa": sdpa,
    "torch": torch_form,
    "fla": fla,
}


def child(sections: list[str], log: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    torch.manual_seed(0)
    for section in sections:
        done = {row["begin"] for row in rows if row["section"] == section and "begin" in row}
        if any(row["section"] == section and row.get("finished") for row in rows):
            continue

        def emit(section=section, **row: object) -> None:
            with log.open("a") as file:
                file.write(json.dumps({"section": section, **row}) + "\n")
            if "begin" not in row:
                say(section, json.dumps(short(row)))

        try:
            RUN[section](emit, done)
        except (RuntimeError, triton.CompilationError, triton.OutOfResources, TypeError) as error:
            emit(failed=f"{type(error).__name__}: {error}"[:400])
            if "CUDA" in str(error) or "illegal" in str(error):
                raise
        emit(finished=True)
        torch.cuda.empty_cache()


def short(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: short(x) for key, x in value.items()}
    return value


def report(log: Path, out: Path, command: str) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in rows if "begin" not in row and not row.get("finished")]
    gpu = torch.cuda.get_device_name()
    lines = [f"# Kernels on {gpu}", "", f"torch {torch.__version__}, triton {triton.__version__}; `{command}`", ""]
    lines += ["Times in ms, medians; errors are relative rms against fp64 on the same inputs.", ""]
    found = [row for row in rows if row["section"] == "table" and "both" in row]
    lines += ["| shape | forward | forward + backward | GiB beyond inputs | kernels |", "|---" * 5 + "|"]
    for row in found:
        parts = ", ".join(f"{kernel} {ms:.2f}" for kernel, ms in row["ms"].items())
        forward, gib = (f"{row[key]:.2f}" if key in row else "" for key in ("fwd", "gib"))
        lines.append(f"| {row['case']} | {forward} | {row['both']:.2f} | {gib} | {parts} |")
    lines.append("")
    for section in SECTIONS:
        others = [row for row in rows if row["section"] == section and row not in found]
        if others:
            lines += [f"## {section}", ""]
            lines += [
                f"- {row.get('case', 'failed')}: `"
                + json.dumps(short({k: v for k, v in row.items() if k not in ("section", "case")}))
                + "`"
                for row in others
            ]
            lines.append("")
    out.write_text("\n".join(lines))
    say("wrote", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--budget", type=float, default=230.0)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker or options.child:
        die_with_parent()
    if options.worker:
        worker(*map(int, options.worker.split("/")))
        return
    sections = options.sections.split(",")
    if options.child:
        child(sections, Path(options.child))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().lower().replace(" ", "_").replace("nvidia_", "")
    log = options.out / f"kernels_{gpu}.jsonl"
    log.unlink(missing_ok=True)
    me = [sys.executable, str(Path(__file__).resolve())]
    if not {"sweep", "table", "errors"}.isdisjoint(sections):
        workers = [subprocess.Popen([*me, "--worker", f"{i}/{options.workers}"]) for i in range(options.workers)]
        for process in workers:
            try:
                process.wait(max(1.0, options.budget * 0.6 - (time.time() - START)))
            except subprocess.TimeoutExpired:
                process.kill()
        say("compiled")
    while (left := options.budget - (time.time() - START)) > 5:
        process = subprocess.Popen([*me, "--child", str(log), "--sections", options.sections])
        try:
            if process.wait(left) == 0:
                break
            say("a section died; going on after it")
        except subprocess.TimeoutExpired:
            process.kill()
            say("out of time")
    report(log, options.out / f"kernels_{gpu}.md", "python3 " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
