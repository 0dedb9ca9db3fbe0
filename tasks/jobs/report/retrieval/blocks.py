"""Needles and RULER in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from radlads.tasks.contracts.stages import NEEDLE
from radlads.tasks.jobs.data.ruler.tasks import GROUPS
from radlads.tasks.jobs.report.number_format import rate_of, times
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Heading, Picture, Table

_SOURCE = "source"


def retrieval_blocks(products: Products, pictures: Sequence[str]) -> list[Block]:
    """The needle grid and RULER's table; empty without a needle stage."""
    sheet, product = products.needle, products.of_stage(NEEDLE.name)
    if sheet is None or product is None:
        return []
    names = list(sheet["models"])
    rows = [
        (
            f"{length} tokens",
            *(rate_of(sheet["models"][name]["by_length"][str(length)]) for name in names),
            product.short,
        )
        for length in sorted(set(sheet["lengths"]))
    ]
    blocks: list[Block] = [Heading("Needle in a haystack")]
    if "needle.png" in pictures:
        caption = (
            f"Share of facts found by greedy generation and string match, {sheet['trials']} trials per cell. Dashed: "
            f"the training length, {sheet['training_length']} tokens. Grey: not run."
        )
        blocks.append(
            Picture("needle.png", "Heatmap of needles found by length and depth, one panel per model", caption)
        )
    blocks.append(Table(("length", *names, _SOURCE), rows, "Mean over depths.", words=(_SOURCE,)))
    ruler = ruler_table(products)
    return blocks if ruler is None else [*blocks, Heading("RULER"), ruler]


def ruler_table(products: Products) -> Table | None:
    """Every task at every length, teacher / student; then means. None where RULER was not judged."""
    sheet, product = products.needle, products.of_stage(NEEDLE.name)
    ruler = None if sheet is None else sheet.get("ruler")
    if ruler is None or product is None:
        return None
    names, lengths = list(ruler["models"]), ruler["lengths"]
    cells = {(cell["task"], cell["length"]): cell for cell in ruler["cells"]}
    rows = [
        (task, *(_of_models([cells[task, n][name] for name in names]) for n in lengths), product.short)
        for task in ruler["tasks"]
    ]
    means = (_of_models([ruler["models"][name]["by_length"][str(n)] for name in names]) for n in lengths)
    rows.append(("mean", *means, product.short))
    caption = (
        f"Scores in %, {' / '.join(names)}, ± one standard error of the last; {ruler['samples']} prompts a task and "
        f"length{', in the chat template' if ruler['chat'] else ''}, greedy, with RULER's string match (2404.06654); "
        "prompt and answer fit in the length."
    )
    return Table(("task", *(f"{n} tokens" for n in lengths), _SOURCE), rows, caption, words=(_SOURCE,))


def ruler_rows(ruler: Mapping[str, Any] | None, source: str) -> list[tuple[str, str, str, str, str]]:
    """Rows of the summary: the mean, and each group of tasks; none where RULER was not judged."""
    if ruler is None:
        return []
    theirs, ours = ruler["models"]["teacher"], ruler["models"]["student"]
    pairs = [(f"RULER, mean of {len(ruler['tasks'])} tasks", theirs, ours)]
    pairs += [(f"… {GROUPS[g]}", theirs["by_group"][g], ours["by_group"][g]) for g in theirs["by_group"]]
    return [(label, _rate(one), _rate(two), times(one, two), source) for label, one, two in pairs]


def left_out(ruler: Mapping[str, Any]) -> str:
    """`13 of 13 tasks`, or `11 of 13 tasks: qa_1 (no question file (squad)), …`."""
    judged, missing = ruler["tasks"], ruler["left_out"]
    why: dict[str, list[str]] = {}
    for task, reason in missing.items():
        why.setdefault(reason, []).append(task)
    reasons = "; ".join(f"{reason}: {', '.join(tasks)}" for reason, tasks in why.items())
    return f"{len(judged)} of {len(judged) + len(missing)} tasks" + (f" ({reasons})" if reasons else "")


def _rate(cell: Mapping[str, Any] | None) -> str:
    return rate_of(cell if cell and cell["mean"] is not None else None)


def _of_models(cells: Sequence[Mapping[str, Any] | None]) -> str:
    """100 / 85 ± 7."""
    shown = " / ".join("not run" if cell is None else f"{100 * cell['mean']:.0f}" for cell in cells)
    last = cells[-1]
    return shown if last is None else f"{shown} ± {100 * last['stderr']:.0f}"
