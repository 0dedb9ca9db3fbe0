"""Speed of training at real shapes: the product's own job compared with a plain build of the same step.

    python benchmarks/training.py --shape qwen2.5-7b --layers 8 --stage distill --micro-batch 12 --compare-plain
    python benchmarks/training.py --recipe hrwkv7-reka-flash-3.1 --stage distill --layers 6 --profile
    python benchmarks/training.py --shape smollm2-135m --micro-batch 96 --gpus 1 --profile --compare-plain
    python benchmarks/training.py --shape smollm2-135m --micro-batch 96 --compare-unfused   # fused kernels, then torch
    python benchmarks/training.py --shape qwen2.5-7b --context 32768 --gpus 4 --sequence-parallel 4 --zero 3 \\
        --grad-checkpointing                                                   # long rows, shared by GPUs
    python benchmarks/training.py --shape qwen2.5-7b --layers 8 --gpus 4 --engine deepspeed   # its ZeRO-2
    python benchmarks/training.py --shape smollm2-135m --micro-batch 96 --cuda-graphs on --selective-checkpointing
    python benchmarks/training.py --sweep-file cases.txt --compare-plain       # a line of options for every case
    python benchmarks/training.py --shape qwen2.5-7b --gpus 4 --micro-batch 12 --record    # rows for the plan
    python benchmarks/training.py --shape tiny --device cpu                    # a rehearsal without a GPU

A random teacher of a public shape is written to files, the product's transplant makes the student, random tokens are
the dataset, and the product's launcher starts its training program for a few steps. The rows go to
results/training_<gpu>.md. Neither network, Prefect nor MLflow is needed. Run nothing else on the same GPUs at the same
time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from training_bench.case import ENGINES, SECTIONS, Case, recipe_settings
from training_bench.inputs import Inputs, case_flops
from training_bench.launching import run_plain, run_product
from training_bench.recording import check_recordable, speed_row
from training_bench.report import Row, describe_machine, details, gpu_name, legend, table
from training_bench.shapes import SHAPES

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.plan.timing.measured import TABLE, record_row

logger = logging.getLogger("training")

_STATE_BYTES = 12  # of a trained number: its master and moments in a checkpoint


def parse() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="default: the recipe's, else smollm2-135m")
    parser.add_argument("--stage", choices=list(SECTIONS), default="distill")
    parser.add_argument("--recipe", help="take what is not given here from a shipped recipe")
    parser.add_argument("--layers", type=int, help="cut the depth")
    parser.add_argument("--variant")
    parser.add_argument("--variant-options", type=json.loads, metavar="JSON", help='for example {"form": "groupnorm"}')
    parser.add_argument("--attention-layers", nargs="*", type=int, metavar="LAYER", help="stay softmax attention")
    parser.add_argument("--context", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--batch", type=int, help="sequences of a step over all GPUs; default: one pass on each")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--sequence-parallel", type=int, metavar="GPUS", help="GPUs that share rows")
    parser.add_argument("--zero", type=int)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--engine", choices=ENGINES, default="product", help="candidates for ZeRO-2, see product.py")
    parser.add_argument("--grad-checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--selective-checkpointing", action="store_true", help="recompute only what is cheap")
    parser.add_argument("--cuda-graphs", choices=("off", "auto", "on"), help="record passes and replay them")
    parser.add_argument("--mlp-bits", type=int, choices=(8, 16))
    parser.add_argument("--teacher-bits", type=int, choices=(8, 16))
    parser.add_argument("--freeze", nargs="*", help="parameter groups that do not train")
    parser.add_argument("--steps", type=int, default=5, help="measured optimizer steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--decay-dtype", choices=("auto", "float32", "bfloat16"), help="of the log decay")
    parser.add_argument("--unfused", action="store_true", help="mixers in torch around their recurrence")
    parser.add_argument("--compare-unfused", action="store_true", help="a second run of the product, unfused")
    parser.add_argument("--compare-plain", action="store_true")
    parser.add_argument("--profile", type=int, nargs="?", const=2, default=0, metavar="STEPS", help="and profile some")
    parser.add_argument("--memory", action="store_true", help="and tell what fills a GPU at a step's peak")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=TABLE, metavar="JSON", help="add the product's rows to the plan's table"
    )
    parser.add_argument("--no-checkpoint", action="store_true", help="do not measure the stall of a checkpoint")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end a run that takes longer")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of a process; default: the cores, divided evenly")
    parser.add_argument("--work", type=Path, help="folder to keep, so that later runs find teacher and student")
    parser.add_argument("--out", type=Path, help="Markdown file to add to")
    parser.add_argument("--sweep-file", type=Path, help="a line of further options for every case; # for comments")
    return parser


def build_case(options: argparse.Namespace) -> Case:
    """The case that the options and the recipe, which they go before, describe. Raises UserError."""
    for name in ("layers", "gpus", "context", "micro_batch", "batch", "sequence_parallel", "steps"):
        if (count := getattr(options, name)) is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} {count}: give a number of at least 1")
    settings: dict[str, Any] = {"shape": options.shape or "smollm2-135m", "stage": options.stage}
    if options.recipe:
        settings |= recipe_settings(options.recipe, options.stage, options.layers, options.shape)
    given = {
        "shape": options.shape,
        "layers": options.layers,
        "variant": options.variant,
        "options": options.variant_options,
        "attention_layers": options.attention_layers,
        "context": options.context,
        "micro_batch": options.micro_batch,
        "batch": options.batch,
        "zero": options.zero,
        "sequence_parallel": options.sequence_parallel,
        "gradient_checkpointing": "selective" if options.selective_checkpointing else options.grad_checkpointing,
        "cuda_graphs": options.cuda_graphs,
        "mlp_bits": options.mlp_bits,
        "teacher_bits": options.teacher_bits,
        "freeze": options.freeze,
        "decay_dtype": options.decay_dtype,
    }
    if options.variant not in (None, settings.get("variant")):
        settings["options"] = {}  # the recipe's are another variant's
    settings |= {name: value for name, value in given.items() if value is not None}
    for name in ("attention_layers", "freeze"):
        settings[name] = tuple(settings.get(name, ()))
    one_pass = settings.get("micro_batch", 1) * max(1, options.gpus // settings.get("sequence_parallel", 1))
    if options.batch is None:  # the recipe's, as far as whole passes of these GPUs make it up
        settings["batch"] = max(one_pass, settings.get("batch", one_pass) // one_pass * one_pass)
    case = Case(
        **settings,
        gpus=options.gpus,
        offload=options.offload,
        engine=options.engine,
        fused=not options.unfused,
        steps=options.steps,
        warmup=options.warmup,
        profile_steps=options.profile,
        memory=options.memory,
        checkpoint=not options.no_checkpoint,
        device=options.device,
    )
    case.check()
    if case.sequence_parallel > 1 and options.compare_plain:
        raise UserError("the plain build has no rows that GPUs share: leave out --compare-plain or --sequence-parallel")
    return case


def run_case(case: Case, work: Path, number: int, options: argparse.Namespace) -> list[Row]:
    """The product's row, then the others that are asked for."""
    flops, parameters = case_flops(case)
    free = shutil.disk_usage(work).free
    needed = _STATE_BYTES * parameters
    if case.checkpoint and case.stage != "align" and needed > 0.5 * free:
        logger.warning("no checkpoint: it could take %.0f GB, and %.0f GB are free", needed / 1e9, free / 1e9)
        case = dataclasses.replace(case, checkpoint=False)
    inputs = Inputs(work, case)
    name = f"{number:03d}-{case.stage}"
    rows = []
    threads, limit = options.threads or max(1, (os.cpu_count() or 1) // case.gpus), options.timeout
    try:
        job = inputs.make(name, threads)
        rows.append(_row(case, "product", flops, lambda: run_product(job, case.to_json(), limit)))
        if options.compare_unfused:
            torch_forms, again = dataclasses.replace(case, fused=False), inputs.make(f"{name}-unfused", threads)
            rows.append(_row(torch_forms, "product", flops, lambda: run_product(again, torch_forms.to_json(), limit)))
        if options.compare_plain:
            rows.append(_row(case, "plain", flops, lambda: run_plain(job, case.to_json(), inputs.teacher, limit)))
    except UserError as error:
        rows.append(Row(case, "its files", flops, [], str(error)))
    finally:
        made, scratch = Path(inputs.store.root) / "products", work / "scratch"
        for own in (name, f"{name}-unfused"):
            for folder in (scratch / own, scratch / f"{own}-plain", made / own, made / f"data-{own}"):
                shutil.rmtree(folder, ignore_errors=True)
    return rows


def _row(case: Case, build: str, flops: Any, run: Any) -> Row:
    logger.info("%s, %s: started", case.name, build)
    try:
        measured = run()
    except UserError as error:
        logger.error("%s, %s: %s", case.name, build, error)
        return Row(case, build, flops, [], str(error))
    row = Row(case, measured[0].get("build", build), flops, measured)
    logger.info("%s, %s: %.0f tokens/s/GPU", case.name, row.build, row.tokens_per_second)
    return row


def read_sweep(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[argparse.Namespace]:
    """The options of every case."""
    options = parser.parse_args(arguments)
    if options.sweep_file is None:
        return [options]
    lines = [line.split("#")[0].strip() for line in options.sweep_file.read_text(encoding="utf-8").splitlines()]
    return [parser.parse_args([*arguments, *shlex.split(line)]) for line in lines if line]


def _roomy(cases: Sequence[Case]) -> Path | None:
    """Memory, where it is free for three copies of everything at once and as much again; else the usual place."""
    memory = Path("/dev/shm")
    needed = sum(2 * 3 * parameters for parameters in {case_flops(case)[1] for case in cases})
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed + (4 << 30) else None


def main() -> int:
    """Run the cases; 1 if one did not finish."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    arguments = sys.argv[1:]
    try:
        sweep = read_sweep(parse(), arguments)
        cases = [build_case(options) for options in sweep]
    except ValidationError as error:
        found = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in error.errors())
        raise SystemExit(f"training.py: {'; '.join(found)}") from None
    except (UserError, ValueError, OSError) as error:
        raise SystemExit(f"training.py: {error}") from None
    first = sweep[0]
    gpu = gpu_name() if first.device == "cuda" else "cpu"
    if gpu is None:
        raise SystemExit("training.py: there is no GPU; give --device cpu for a rehearsal")
    if first.record is not None:
        try:
            check_recordable(cases, gpu)
        except UserError as error:
            raise SystemExit(f"training.py: {error}") from None
    file = "training_" + "_".join(gpu.lower().replace("nvidia", "").split()) + ".md"
    out = first.out or Path(__file__).parent / "results" / file
    before = out.read_text(encoding="utf-8") if out.is_file() else "# Training at real shapes\n\n"
    command = "python benchmarks/training.py " + shlex.join(arguments)
    rows: list[Row] = []
    text = ""
    with tempfile.TemporaryDirectory(prefix="radlads-training-", dir=_roomy(cases)) as temporary:
        work = (first.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for number, (case, options) in enumerate(zip(cases, sweep, strict=True)):
            found = run_case(case, work, number, options)
            rows += found
            text = "\n".join([describe_machine(command), table(rows), legend(), *map(details, rows)])
            out.write_text(f"{before}{text}\n", encoding="utf-8")  # at once, in case a later case fails
            if first.record is not None and not found[0].failed:
                record_row(speed_row(found[0], gpu=gpu, command=command, file=out), first.record)
    sys.stdout.write(text)
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
