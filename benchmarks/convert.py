"""Run whole conversions without the orchestrator, and write one table of what came out.

    python benchmarks/convert.py benchmarks/recipes/stories260k.yaml smoke --out benchmarks/results/convert.md
    python benchmarks/convert.py smoke --set student.attention_layers=[] --name smoke-pure

Every stage is the job that the flow launches, by the same launcher; only Prefect and MLflow are left out, so that it
runs on a machine that has neither. A second run with the same --work goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import follow_moves
from radlads.tasks.contracts.recipe.choice import choice_data
from radlads.tasks.contracts.specs import PlanReport, StageSpec
from radlads.tasks.pipeline import Pipeline, open_pipeline
from radlads.tasks.stage import Product, run_stage
from radlads.tasks.stage_specs import (
    choose_spec,
    evaluate_spec,
    needle_spec,
    planned_teacher,
    tokenize_spec,
    train_spec,
    transplant_spec,
)

logger = logging.getLogger("convert")
COLUMNS = (
    ("teacher bpb", "teacher/bits_per_byte"),
    ("student bpb", "student/bits_per_byte"),
    ("ratio", "bits_per_byte_ratio"),
    ("KL transplant", "kl/transplant"),
    ("KL align", "kl/align"),
    ("KL distill", "kl/distill"),
    ("KL final", "kl"),
    ("top-1", "top1_agreement"),
)


def convert(recipe: str, name: str, overrides: dict[str, Any], work: Path) -> dict[str, Any]:
    """All stages of a recipe up to the judging; returns the numbers that its manifests hold."""
    places = {"store": str(work / "store"), "work": str(work / "work"), "tracking": "none"}
    with open_pipeline(recipe, overrides=overrides, run=name, run_id=name, **places) as pipeline:
        return run_stages(pipeline)


def run_stages(pipeline: Pipeline) -> dict[str, Any]:
    """The stages that the pipeline's recipe has, up to the judging; returns the numbers that their manifests hold."""
    wanted, numbers = pipeline.recipe, {"stage seconds": {}, "stage speed": {}}

    def run(stage: Any, spec: StageSpec, inputs: dict[str, Product], label: str = "") -> Product:
        began = time.monotonic()
        product = run_stage(pipeline.request(stage, spec, inputs))
        numbers["stage seconds"][label or stage] = round(time.monotonic() - began, 1)
        logger.info(
            "%s %s: %.1f s%s", pipeline.run, label or stage, time.monotonic() - began, " (reused)" * product.reused
        )
        return product

    planned = run("plan", pipeline.plan_spec(wanted), {})
    report = PlanReport.model_validate_json(pipeline.store.read_file(pipeline.store.key(planned.uri), "plan.json"))
    report = follow_moves(wanted, report, ContentHashes(pipeline.settings.content_cache))
    planned_teacher(report)
    data = {}
    for name in wanted.datasets_used:
        data[name] = run("tokenize", tokenize_spec(wanted, report, name), {}, f"tokenize {name}")
    students = {"transplant": run("transplant", transplant_spec(wanted, report), {})}
    for stage in wanted.training_stages:
        spec = train_spec(wanted, report, stage)
        student = students[list(students)[-1]]
        students[stage] = run(stage, spec, {"data": data[spec.section.data], "student": student})
        numbers["stage speed"][stage] = _metric(students[stage].manifest, "tokens_per_second")
        choice = choose_spec(wanted, report) if stage == "align" else None
        if choice is not None:
            name = choice_data(wanted)
            given = {"student": students["align"]} | ({"data": data[name]} if name else {})
            students["choose"] = run("choose", choice, given)
            numbers["choice"] = students["choose"].manifest.metrics
    *earlier, last = students
    if wanted.evaluate:
        inputs = {"student": students[last], "data": data[wanted.evaluate.data], **{s: students[s] for s in earlier}}
        numbers |= run("evaluate", evaluate_spec(wanted, report), inputs).manifest.metrics
        numbers.setdefault(f"kl/{last}", numbers["kl"])
    if wanted.needle:
        numbers |= run("needle", needle_spec(wanted, report), {"student": students[last]}).manifest.metrics
    return numbers


def _metric(manifest: Manifest, name: str) -> float | None:
    value = manifest.metrics.get(name)
    return round(float(value)) if value is not None else None


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row a run, then needle by length, speed and time."""
    heads = [head for head, _ in COLUMNS]
    lines = ["| run | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, numbers in results.items():
        cells = [f"{numbers[key]:.4f}" if key in numbers else "–" for _, key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| run | needle teacher | needle student | by length (student) | tokens/s | seconds |",
        "| --- |" + " --- |" * 5,
    ]
    for name, numbers in results.items():
        lengths = {k.removeprefix("student/needle/"): v for k, v in numbers.items() if k.startswith("student/needle/")}
        cells = [
            *(f"{numbers[k]:.3f}" if k in numbers else "–" for k in ("teacher/needle", "student/needle")),
            ", ".join(f"{length}: {value:.2f}" for length, value in lengths.items()) or "–",
            ", ".join(f"{stage} {value}" for stage, value in numbers["stage speed"].items()),
            ", ".join(f"{stage} {value}" for stage, value in numbers["stage seconds"].items()),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hardware() -> str:
    """What it ran on, and with what."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU only, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f"{gpu}; {versions}; commit {done.stdout.strip() or 'unknown'}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="override, for every recipe")
    parser.add_argument("--name", help="name of the run, where there is one recipe")
    parser.add_argument("--work", type=Path, default=Path(".radlads/benchmark"))
    parser.add_argument("--out", type=Path, help="markdown file to write")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; timings are worth less then")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    overrides = {key: json.loads(value) for key, value in (item.split("=", 1) for item in asked.set)}
    names = [asked.name or Path(recipe).stem for recipe in asked.recipes]
    with ThreadPoolExecutor(asked.parallel) as pool:
        work = asked.work.absolute()
        done = pool.map(lambda r, n: convert(r, n, overrides, work), asked.recipes, names)
        results = dict(zip(names, done, strict=True))
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    text = f"# Conversions\n\n{datetime.now(UTC):%Y-%m-%d}, {hardware()}\n\n    {command}\n\n{table(results)}\n"
    logger.info("%s", text)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
