"""The publish job: the finished model with its card, and the report of its run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.weights.checkpoint_files import find_weight_files
from radlads.tasks.contracts.recipe.recipe import dump_recipe
from radlads.tasks.contracts.recipe.sections import Recipe
from radlads.tasks.contracts.specs import PublishSpec
from radlads.tasks.contracts.stages import ALIGN, CHOOSE, JUDGING_STAGES, NEEDLE, PRETRAIN, TRAINING_STAGES
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.report.card import teacher_name, write_card
from radlads.tasks.jobs.report.curves import draw_layers, draw_losses
from radlads.tasks.jobs.report.html_page import render_html
from radlads.tasks.jobs.report.judged.speed_picture import draw_speed
from radlads.tasks.jobs.report.judged.speed_report import SPEED_PICTURE
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Verdict, render_markdown
from radlads.tasks.jobs.report.report_body import build_report
from radlads.tasks.jobs.report.verdicts import judge
from radlads.tasks.jobs.report.watch_report import watch_verdicts
from radlads.tasks.jobs.sources import load_tokenizer

logger = logging.getLogger("radlads")


def main(job: Job) -> dict[str, Any]:
    """Write model/ with README.md, report.md, report.html, verdicts.json, recipe.yaml and
    pictures; returns the main metrics."""
    spec: PublishSpec = job.typed
    recipe = spec.recipe
    products = Products(job)
    shutil.rmtree(job.output)
    trusted = recipe.teacher is not None and recipe.teacher.trust_remote_code
    copy_model(products, job.scratch / "final", job.output / "model", spec.section.max_shard_bytes, trusted)
    pictures = draw_pictures(products, job.output)
    verdicts: list[Verdict] = []
    if recipe.teacher is not None:
        searched = products.of_stage(NEEDLE.name)
        verdicts = judge(
            products.evaluation,
            products.needle,
            needle_metrics=searched.manifest.metrics if searched else {},
            final_stage=products.final.manifest.stage,
        )
    verdicts += watch_verdicts(products)
    title = spec.section.title or _title(products, recipe, job.spec.run)
    blocks = build_report(products, recipe, verdicts, pictures)
    (job.output / "report.md").write_text(render_markdown(title, blocks), encoding="utf-8")
    (job.output / "report.html").write_text(render_html(title, blocks, job.output), encoding="utf-8")
    (job.output / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (job.output / "model" / "README.md").write_text(write_card(products, recipe, verdicts, title=title), "utf-8")
    for name in ("report.html", *pictures):
        job.record.artifact(job.output / name)
    told = [{"level": verdict.level, "text": verdict.text} for verdict in verdicts]
    (job.output / "verdicts.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for verdict in verdicts:
        logger.log(logging.WARNING if verdict.level == "warning" else logging.INFO, "%s", verdict.text)
    return _metrics(products) | {"warnings": sum(verdict.level == "warning" for verdict in verdicts)}


def copy_model(
    products: Products, scratch: Path, folder: Path, max_shard_bytes: int, trust_remote_code: bool = False
) -> None:
    """Copy the final model; export it again if a shard is larger than max_shard_bytes. trust_remote_code: for its
    tokenizer."""
    scratch.mkdir(parents=True, exist_ok=True)
    source = products.fetch_model(scratch)
    largest = max(path.stat().st_size for path in find_weight_files(str(source)))
    # A shard's file is its tensors, which the limit is about, and a header.
    if largest <= max_shard_bytes + max_shard_bytes // 100 or products.final.manifest.stage == PRETRAIN.name:
        shutil.copytree(source, folder)
        return
    tokenizer = load_tokenizer(str(source), trust_remote_code=trust_remote_code)
    export_student(load_student(source), tokenizer, folder, max_shard_bytes=max_shard_bytes)


def draw_pictures(products: Products, folder: Path) -> list[str]:
    """Draw or copy the available pictures (losses, layers, speed, needle, choose); returns their file names."""
    pictures = []
    sheets = {stage: sheet for stage in TRAINING_STAGES if (sheet := products.sheet(stage, "train.json")) is not None}
    sheets = {stage: sheet for stage, sheet in sheets.items() if sheet["losses"]}
    if sheets:
        draw_losses(sheets, folder / "losses.png")
        pictures.append("losses.png")
    if draw_layers(products.rows(ALIGN.name), folder / "layers.png"):
        pictures.append("layers.png")
    evaluation = products.evaluation
    if evaluation is not None and "speed" in evaluation and draw_speed(evaluation["speed"], folder / SPEED_PICTURE):
        pictures.append(SPEED_PICTURE)
    for stage, name in ((NEEDLE.name, "needle.png"), (CHOOSE.name, "choose.png")):
        picture = products.picture(stage, name)
        if picture is not None:
            (folder / name).write_bytes(picture)
            pictures.append(name)
    return pictures


def _title(products: Products, recipe: Recipe, run: str) -> str:
    if recipe.teacher is None:
        return f"{recipe.name}: a teacher"
    kind = "hybrid" if products.attention_layers(recipe) else "pure"
    return f"{teacher_name(recipe)} → {recipe.student.variant} ({kind}), run {run}"


def _metrics(products: Products) -> dict[str, Any]:
    """The metrics by which runs are compared, copied from evaluate and needle."""
    names = (
        "kl",
        "top1_agreement",
        "relative_score",
        "bits_per_byte_ratio",
        "student/bits_per_byte",
        "teacher/bits_per_byte",
        "student/needle",
        "teacher/needle",
        "needle_ratio",
        "needle_at_training_length_ratio",
        "student/ruler",
        "teacher/ruler",
        "ruler_ratio",
    )
    metrics: dict[str, Any] = {}
    for stage in JUDGING_STAGES:
        product = products.of_stage(stage)
        if product is not None:
            metrics |= {key: product.manifest.metrics[key] for key in names if key in product.manifest.metrics}
    return metrics


if __name__ == "__main__":
    run_job(main)
