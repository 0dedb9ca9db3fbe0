"""The first table of a report: what the conversion kept, what it gained, and what it cost."""

from __future__ import annotations

from typing import Any

from radlads.tasks.contracts.recipe.sections import Recipe
from radlads.tasks.contracts.stages import EVALUATE, NEEDLE, TRAINING_STAGES
from radlads.tasks.jobs.report.number_format import count, dollars, duration, measured, plain, times
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Table

_SOURCE = "source"


def reason_table(products: Products, recipe: Recipe) -> Table | None:
    """Five lines; None for a run without a teacher or a judge."""
    if recipe.teacher is None or (products.evaluation is None and products.needle is None):
        return None
    rows = [_quality(products), _recall(products), *_gains(products), _cost(products, recipe)]
    header = ("", "student beside its teacher", _SOURCE)
    return Table(header, [row for row in rows if row is not None], words=header)


def _quality(products: Products) -> tuple[str, str, str]:
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    if evaluation is None or judged is None:
        return "quality", "not measured", ""
    student = evaluation["models"]["student"]
    parts = [f"bits per byte × {measured(student['bits_per_byte_ratio'])}"]
    metrics = judged.manifest.metrics
    if "relative_score" in metrics:
        estimate = {"value": metrics["relative_score"], "stderr": metrics.get("relative_score_stderr")}
        parts.append(f"benchmarks over chance × {measured(estimate)}")
    return "quality", "; ".join(parts), judged.short


def _recall(products: Products) -> tuple[str, str, str]:
    needle, searched = products.needle, products.of_stage(NEEDLE.name)
    if needle is None or searched is None:
        return "recall", "not measured", ""
    parts = [f"needles found {times(needle['models']['teacher'], needle['models']['student'])}"]
    ruler = searched.manifest.metrics.get("ruler_ratio")
    if ruler is not None:
        parts.append(f"RULER × {plain(ruler, 2)}")
    return "recall", "; ".join(parts), searched.short


def _gains(products: Products) -> list[tuple[str, str, str]]:
    """Speed and memory at the longest length that both models ran."""
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    if evaluation is None or judged is None or "speed" not in evaluation:
        return [("speed and memory", "not measured; `evaluate.speed` measures them", "")]
    sheet = evaluation["speed"]
    both = [row for row in sheet["lengths"] if row["teacher"] and row["student"]]
    if not both:
        return [("speed and memory", "no length could be run by both", judged.short)]
    row = max(both, key=lambda one: int(one["length"]))
    at = f"at {count(row['length'])} tokens on {_device(sheet['device'])}"
    found = [
        ("speed", f"writes × {_ratio(row, 'tokens_per_second')} tokens a second, reads the prompt in "
         f"× {_ratio(row, 'prompt_seconds')} of the time, {at}", judged.short)
    ]  # fmt: skip
    if row["teacher"].get("memory_bytes") and row["student"].get("memory_bytes"):
        found.append(("memory", f"× {_ratio(row, 'memory_bytes')}, {at}", judged.short))
    return found


def _ratio(row: dict[str, Any], key: str) -> str:
    theirs, ours = row["teacher"].get(key), row["student"].get(key)
    return plain(ours / theirs, 2) if theirs and ours else "–"


def _cost(products: Products, recipe: Recipe) -> tuple[str, str, str] | None:
    """Of all training: its time, what was paid, and the hardware."""
    trained = [product for stage in TRAINING_STAGES if (product := products.of_stage(stage)) is not None]
    if not trained:
        return None
    metrics = [product.manifest.metrics for product in trained]
    seconds = sum(float(one.get("seconds") or 0.0) for one in metrics)
    hours = sum(float(one.get("gpu_hours") or 0.0) for one in metrics)
    parts = [f"{duration(seconds)} of training, {count(sum(int(one.get('tokens') or 0) for one in metrics))} tokens"]
    if hours:
        price = recipe.resources.dollars_per_gpu_hour
        parts.append(f"{plain(hours, 2)} GPU hours" + (f", {dollars(hours * price)}" if price else ""))
    parts += [f"on {words}" for words in hardware(products)]
    return "conversion took", "; ".join(parts), ", ".join(product.short for product in trained)


def hardware(products: Products) -> list[str]:
    """ "8 × NVIDIA H100 80GB HBM3" of each machine that trained, in order, once."""
    found = []
    for stage in TRAINING_STAGES:
        sheet = products.sheet(stage, "train.json")
        if sheet is not None and "device" in sheet:
            found.append(f"{sheet.get('processes', 1)} × {_device(sheet['device'])}")
    return list(dict.fromkeys(found))


def _device(name: str) -> str:
    return "CPU" if name == "cpu" else name
