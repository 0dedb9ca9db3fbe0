"""Run whole conversions without the orchestrator, and write one table of the results.

    python benchmarks/convert.py benchmarks/recipes/stories260k.yaml smoke --out benchmarks/results/convert.md
    python benchmarks/convert.py smoke --set student.attention_layers=[] --name smoke-pure

Every stage is the job that the flow launches, by the same launcher; only Prefect and MLflow are left out, so that it
runs on a machine that has neither. A second run with the same --work continues where the first stopped.
"""

from __future__ import annotations

import argparse
import logging
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.parsing.yaml_reader import parse_value
from radlads.tasks.contracts.stages import CHOOSE, STUDENT_STAGES, stage_info
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.graph import convert
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.pipeline import Pipeline, open_pipeline
from radlads.tasks.plain_runner import PlainRunner, StageRun

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


def convert_recipe(recipe: str, name: str, overrides: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run all stages of a recipe; returns the numbers in its manifests."""
    places = {"store": str(work / "store"), "work": str(work / "work"), "tracking": "none"}
    with open_pipeline(recipe, overrides=overrides, run=name, run_id=name, **places) as pipeline:
        return run_stages(pipeline)


def run_stages(pipeline: Pipeline) -> dict[str, Any]:
    """Run the stages of the pipeline's recipe; returns the numbers in their manifests."""
    numbers: dict[str, Any] = {"stage seconds": {}, "stage speed": {}}

    def note(done: StageRun) -> None:
        stage, metrics = stage_info(done.request.stage), done.product.manifest.metrics
        numbers["stage seconds"][done.label] = round(done.seconds, 1)
        logger.info("%s %s: %.1f s%s", pipeline.run, done.label, done.seconds, " (reused)" * done.product.reused)
        if stage.trains:
            numbers["stage speed"][stage.name] = _metric(done.product.manifest, "tokens_per_second")
        elif stage.judges:
            numbers.update(metrics)

    made = convert(pipeline.recipe, PlainRunner(pipeline, note))
    if CHOOSE.name in made:
        numbers["choice"] = made[CHOOSE.name].manifest.metrics
    if "kl" in numbers:
        numbers.setdefault(f"kl/{[stage for stage in STUDENT_STAGES if stage in made][-1]}", numbers["kl"])
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


def changes_of(pairs: list[str]) -> dict[str, Any]:
    """["a.b=1"] → {"a.b": 1}, values as YAML. Raises UserError."""
    changes = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise UserError(f"--set {pair[:60]}: write it as KEY=VALUE, e.g. --set distill.tokens=1000000")
        changes[key] = parse_value(text, where=f"--set {key}")
    return changes


def hardware() -> str:
    """Hardware, versions and commit of the run."""
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
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, for every recipe")
    parser.add_argument("--name", help="name of the run, where there is one recipe")
    parser.add_argument("--work", type=Path, default=Path(".radlads/benchmark"))
    parser.add_argument("--out", type=Path, help="markdown file to write")
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; timings are then less reliable")
    parsed = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if parsed.name and len(parsed.recipes) > 1:
        parser.error("--name is for one recipe")
    names = [parsed.name or Path(recipe).stem for recipe in parsed.recipes]
    try:
        overrides = changes_of(parsed.set)
        with ThreadPoolExecutor(parsed.parallel) as pool:
            work = parsed.work.absolute()
            done = pool.map(lambda r, n: convert_recipe(r, n, overrides, work), parsed.recipes, names)
            results = dict(zip(names, done, strict=True))
    except (UserError, StoreError, JobCrashed) as error:  # the same command goes on where it stopped
        parser.exit(2 if isinstance(error, UserError) else 1, f"{parser.prog}: error: {error}\n")
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    text = f"# Conversions\n\n{datetime.now(UTC):%Y-%m-%d}, {hardware()}\n\n    {command}\n\n{table(results)}\n"
    logger.info("%s", text)
    if parsed.out:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        parsed.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
