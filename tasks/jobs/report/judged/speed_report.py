"""`evaluate.speed` in reports: time and memory of teacher and student by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from radlads.tasks.contracts.stages import EVALUATE
from radlads.tasks.jobs.report.number_format import NONE, count, gibibytes, plain
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Heading, Picture, Table

SPEED_PICTURE = "speed.png"
_SOURCE = "source"
_MODELS = ("teacher", "student")
_MEASURES = {
    "prompt_seconds": ("reading the prompt, ms", lambda value: plain(1000 * value, 1)),
    "tokens_per_second": ("tokens written per second", lambda value: plain(value, 1)),
    "memory_bytes": ("peak memory", gibibytes),
}


def speed_table(products: Products) -> Table | None:
    """Teacher and student at every length; None where speed was not measured."""
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    if evaluation is None or judged is None or "speed" not in evaluation:
        return None
    sheet = evaluation["speed"]
    with_memory = any((row[name] or {}).get("memory_bytes") for row in sheet["lengths"] for name in _MODELS)
    rows = [
        (f"{count(row['length'])} tokens: {label}", *_cells(row, key, shown), judged.short)
        for key, (label, shown) in _MEASURES.items()
        if key != "memory_bytes" or with_memory
        for row in sheet["lengths"]
    ]
    caption = (
        f"{sheet['device']}, {evaluation['dtype']}, each model alone, {count(sheet['batch'])} at once, "
        f"{count(sheet['new_tokens'])} tokens written by transformers' `generate`; medians of {sheet['repeats']} "
        f"after a warm-up.{'' if with_memory else ' Memory is measured on GPUs alone.'}"
    )
    missing = [
        f" The {name} was not run at {count(row['length'])} tokens: {why}."
        for row in sheet["lengths"]
        for name, why in row["not_run"].items()
    ]
    header = ("length", "teacher", "student", "student / teacher", _SOURCE)
    return Table(header, rows, caption + "".join(missing), words=(_SOURCE,))


def speed_blocks(products: Products, pictures: Sequence[str]) -> list[Block]:
    """The section of the report; empty where speed was not measured. pictures: as build_report's."""
    table = speed_table(products)
    if table is None:
        return []
    alt = "Speed and memory of teacher and student over the length"
    drawn = [Picture(SPEED_PICTURE, alt, "The same numbers over the length.")] if SPEED_PICTURE in pictures else []
    return [Heading("Memory and speed"), *drawn, table]


def _cells(row: dict[str, Any], key: str, shown: Any) -> tuple[str, str, str]:
    theirs, ours = ((row[name] or {}).get(key) for name in _MODELS)
    ratio = f"× {ours / theirs:.2f}" if theirs and ours else NONE
    one, two = ("not run" if value is None else shown(value) for value in (theirs, ours))
    return one, two, ratio
