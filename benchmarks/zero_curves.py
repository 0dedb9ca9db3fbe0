"""Loss curves of one small distill under every ZeRO stage, number of ranks and number of micro-batches.

    python benchmarks/zero_curves.py                                  # on a CPU
    python benchmarks/zero_curves.py --device cuda --ranks 1 2 4 --steps 100

The batch is the same in all runs, so the curves differ by rounding alone. What rounding does is measured: ZeRO-2 on one
rank with other numbers of micro-batches. bf16 has ZeRO-2 and 3 only, since under 0 and 1 it runs as ZeRO-2
(engines/deepspeed_config.py). The product's training program runs all cases of a number of ranks one after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from training_bench.case import Case
from training_bench.inputs import Inputs, teacher_config
from training_bench.report import describe_machine
from training_bench.shapes import SHAPES
from transformers import AutoModelForCausalLM, AutoTokenizer

from radlads.deployments import demo
from radlads.tasks.contracts.job import JobSpec
from radlads.tasks.contracts.specs import TrainSpec, spec_digest
from radlads.tasks.contracts.stages import DISTILL
from radlads.tasks.jobs import process_group as group
from radlads.tasks.jobs.common import execute, open_job
from radlads.tasks.jobs.exit_reasons import EXIT_CODES
from radlads.tasks.jobs.train import train

BATCH = 16
STAGES = {"fp32": (0, 1, 2, 3), "bf16": (2, 3)}
OTHER_ROUNDINGS = (2, 8)  # micro-batches of ZeRO-2 on one rank
RATE = {"start": 1e-3, "final": 1e-3}
COLOURS = ("#777777", "#2a8a3e", "#2a62b8", "#c2571a")


@dataclass(frozen=True)
class Run:
    """One curve."""

    precision: str
    zero: int
    ranks: int
    passes: int
    """Micro-batches of a step on each rank."""

    @property
    def name(self) -> str:
        return f"{self.precision}-zero{self.zero}-{self.ranks}x{self.passes}"


def reference(precision: str) -> Run:
    """The run that the others are compared with."""
    return Run(precision, 2, 1, 1)


def other_roundings(precision: str) -> list[Run]:
    return [Run(precision, 2, 1, passes) for passes in OTHER_ROUNDINGS]


def write_teacher(case: Case, folder: Path) -> None:
    """A random teacher with weights so large that its student has something to learn; `Inputs` then leaves it alone."""
    config = teacher_config(case)
    config.initializer_range = 0.15
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path(demo.__path__[0]) / "tokenizer").save_pretrained(folder)
    (folder / "complete").touch()


def make_job(run: Run, options: argparse.Namespace, work: Path) -> JobSpec:
    """The run's job, in its scratch folder."""
    sizes = {"micro_batch": BATCH // run.ranks // run.passes, "batch": BATCH, "context": options.context}
    case = Case(
        shape=options.shape,
        stage=DISTILL.name,
        layers=options.layers,
        gpus=run.ranks,
        zero=run.zero,
        steps=options.steps,
        warmup=0,
        checkpoint=False,
        device=options.device,
        **sizes,
    )
    inputs = Inputs(work, case)
    if not inputs.teacher.exists():
        write_teacher(case, inputs.teacher)
    made = inputs.make(run.name, options.threads)
    section = made.spec["section"] | {"precision": run.precision, "mixer_rate": RATE, "rest_rate": RATE}
    spec = TrainSpec.model_validate(made.spec | {"section": section})
    digest = spec_digest(DISTILL.name, spec, made.inputs)
    job = made.model_copy(update={"spec": spec.model_dump(mode="json"), "digest": digest})
    Path(job.scratch).mkdir(parents=True, exist_ok=True)
    (Path(job.scratch) / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    return job


def run_jobs(ranks: int, jobs: list[JobSpec], options: argparse.Namespace, work: Path) -> None:
    """Run jobs of `ranks` processes, one after the other. Exits with the log's end if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": str(options.threads)}
    paths = [str(Path(job.scratch) / "job.json") for job in jobs]
    log = work / f"log-{ranks}.txt"
    with log.open("w", encoding="utf-8") as stream:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", *paths],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=stream,
                stderr=stream,
            )
            for rank in range(ranks)
        ]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise SystemExit(f"{log.read_text(encoding='utf-8')[-4000:]}\nzero_curves.py: a run of {ranks} ranks failed")


def run_rank(paths: list[str]) -> None:
    """One rank of jobs that it runs one after the other."""
    reason = "done"
    for path in paths:
        if reason == "done":
            reason = execute(train.main, open_job(Path(path)))
    group.leave_group(orderly=reason == "done")
    group.end_process(EXIT_CODES[reason])


def read_curve(job: JobSpec) -> np.ndarray:
    """Loss by step."""
    text = (Path(job.scratch) / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


def differences(curves: dict[Run, np.ndarray]) -> dict[Run, np.ndarray]:
    """Run → |loss − the reference's loss| by step."""
    return {run: np.abs(curve - curves[reference(run.precision)]) for run, curve in curves.items()}


def write_table(curves: dict[Run, np.ndarray], runs: list[Run]) -> tuple[str, bool]:
    """The largest differences, beside those of other roundings; and whether all are within twice those."""
    apart, lines, good = differences(curves), [], True
    columns = sorted({(run.ranks, run.passes) for run in runs})
    for precision, stages in STAGES.items():
        curve = curves[reference(precision)]
        noise = max(apart[run].max() for run in other_roundings(precision))
        lines += [
            f"## {precision}: loss {curve[0]:.4f} → {curve[-1]:.4f}",
            "",
            "| largest difference | " + " | ".join(f"{ranks} × {passes}" for ranks, passes in columns) + " |",
            "| --- |" + " --- |" * len(columns),
        ]
        for zero in stages:
            worst = [apart[Run(precision, zero, *column)].max() for column in columns]
            good = good and max(worst) <= 2 * noise
            lines.append(f"| ZeRO-{zero} | " + " | ".join(f"{value:.1e}" for value in worst) + " |")
        lines += ["", f"Other roundings (ZeRO-2, one rank, {OTHER_ROUNDINGS} micro-batches): {noise:.1e} nats.", ""]
    return "\n".join(lines), good


def draw(curves: dict[Run, np.ndarray], runs: list[Run], path: Path) -> None:
    """Above the curves, below their distances from the reference; a column a precision."""
    apart = differences(curves)
    figure, axes = plt.subplots(2, len(STAGES), figsize=(5.2 * len(STAGES), 6.4), sharex=True, layout="constrained")
    for column, precision in enumerate(STAGES):
        above, below = axes[:, column]
        noise = np.max([apart[run] for run in other_roundings(precision)], axis=0)
        steps = np.arange(1, len(noise) + 1)
        below.fill_between(steps, 0, np.maximum.accumulate(noise), color="#dddddd", label="other roundings")
        told = set()
        for run in (run for run in runs if run.precision == precision):
            label = None if run.zero in told else f"ZeRO-{run.zero}"
            told.add(run.zero)
            above.plot(steps, curves[run], color=COLOURS[run.zero], linewidth=0.8, label=label)
            below.plot(steps, np.maximum.accumulate(apart[run]), color=COLOURS[run.zero], linewidth=0.8)
        above.set_title(f"{precision}: {sum(run.precision == precision for run in runs)} runs")
        above.set_ylabel("KL, nats a token")
        below.set_ylabel("largest difference so far, nats")
        below.set_yscale("log")
        below.set_xlabel("optimizer step")
        above.legend(frameon=False, fontsize=8)
        below.legend(frameon=False, fontsize=8)
        for axis in (above, below):
            axis.grid(alpha=0.25)
    mpl.rcParams["svg.hashsalt"] = "zero_curves"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4], help="micro-batches of a step on each rank")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--out", type=Path, help="Markdown file; the picture lies beside it")
    parser.add_argument("--rank-of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    odd = [f"{r} × {p}" for r, p in itertools.product(options.ranks, options.passes) if BATCH % (r * p)]
    if odd:
        parser.error(f"the batch of {BATCH} sequences cannot be divided into {odd[0]} (ranks × passes)")
    if options.device == "cuda" and max(options.ranks) > torch.cuda.device_count():
        parser.error(f"there are {torch.cuda.device_count()} GPUs for {max(options.ranks)} ranks")
    return options


def main() -> int:
    options = parse()
    if options.rank_of:
        run_rank(options.rank_of)
    grid = itertools.product(options.ranks, options.passes)
    runs = [Run(precision, zero, *sizes) for sizes in grid for precision, stages in STAGES.items() for zero in stages]
    more = [run for precision in STAGES for run in (reference(precision), *other_roundings(precision))]
    curves: dict[Run, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="radlads-zero-curves-") as folder:
        work = Path(folder)
        jobs = {run: make_job(run, options, work) for run in dict.fromkeys([*runs, *more])}
        for ranks in sorted({run.ranks for run in jobs}):
            run_jobs(ranks, [job for run, job in jobs.items() if run.ranks == ranks], options, work)
        curves |= {run: read_curve(job) for run, job in jobs.items()}
    table, good = write_table(curves, runs)
    out: Path = options.out or Path(__file__).parent / "results" / f"zero_curves_{options.device}.md"
    draw(curves, runs, out.with_suffix(".svg"))
    command = " ".join(["python benchmarks/zero_curves.py", *sys.argv[1:]])
    verdict = "All curves are" if good else "**Not all curves are**"
    sizes = f"shape {options.shape} with {options.layers} layers, batch {BATCH} × {options.context} tokens"
    out.write_text(
        f"# Loss curves under every ZeRO stage\n\n{describe_machine(command)}\n"
        f"Distill, {sizes}, {options.steps} steps. Columns: ranks × micro-batches.\n"
        f"In nats, against ZeRO-2 on one rank with one micro-batch.\n\n{table}\n"
        f"{verdict} within twice what other roundings do.\n\n![curves]({out.with_suffix('.svg').name})\n",
        encoding="utf-8",
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
