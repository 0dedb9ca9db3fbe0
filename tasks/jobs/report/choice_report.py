"""The choice of attention layers as a table and text, for the report and the model card."""

from __future__ import annotations

from typing import Any

from radlads.tasks.contracts.stages import CHOOSE
from radlads.tasks.jobs.report.number_format import count, percent, plain
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Heading, Picture, Table, Text

_SOURCE = "source"
_SHOWN = 3  # of the sets that a round measured
_PASSED = 0.8  # what a teacher should answer of a probe
_LATER = {
    "one_at_a_time": "",
    "greedy": " Later rounds score the gain over the layers chosen before.",
    "pairs": " The second round restored pairs of the best of these layers.",
}


def choice_table(products: Products) -> Table | None:
    """Every layer's scores, the chosen ones marked; None where nothing was chosen after align."""
    sheet, product = products.choice, products.of_stage(CHOOSE.name)
    if sheet is None or product is None:
        return None
    rows: list[tuple[str, ...]] = []
    if sheet["choose"] == "recall":
        header: tuple[str, ...] = (
            "layer",
            "recall gained",
            "KL saved",
            "remaining KL",
            "recall gained per remaining KL",
            "answers right",
            "chosen",
            _SOURCE,
        )
        for row in sheet["layers"]:
            numbers = tuple(plain(row[key]) for key in ("recall_gained", "kl_saved", "kl", "score"))
            taken = f"yes, round {row['round']}" if row["chosen"] else ""
            rows.append((str(row["layer"]), *numbers, percent(row["accuracy"]), taken, product.short))
        caption = (
            "Each layer alone with the teacher's softmax attention restored, before distill, on the probe data. "
            "Recall: mean log-probability of the answer tokens, nats; KL: nats per token of held-out text. A negative "
            "recall gain is multiplied by the KL instead of divided by it, so that lower KL is always better."
        ) + _LATER[sheet.get("search", "greedy")]
    else:
        header = ("layer", "difficulty", "align loss at the end", "chosen", _SOURCE)
        for row in sheet["layers"]:
            taken = "yes" if row["chosen"] else ""
            rows.append((str(row["layer"]), plain(row["score"]), plain(row["loss"]), taken, product.short))
        caption = "How poorly each layer's mixer fitted its attention during align; the gaps between layers count too."
    return Table(header, rows, caption, words=("chosen", _SOURCE))


def rounds_table(products: Products) -> Table | None:
    """What each round of a search by recall measured; None where there was none, or no record of its kind."""
    sheet, product = products.choice, products.of_stage(CHOOSE.name)
    if sheet is None or product is None or "search" not in sheet:
        return None
    rows: list[tuple[str, ...]] = []
    for found in sheet["rounds"]:
        scores = {layers: score["score"] for layers, score in found["candidates"].items()}
        known = sorted((layers for layers in scores if scores[layers] is not None), key=lambda one: -scores[one])
        best = ", ".join(f"{layers} ({plain(scores[layers])})" for layers in known[:_SHOWN])
        kept, chosen = (", ".join(map(str, found[key])) or "none" for key in ("kept", "chosen"))
        rows.append((str(found["round"]), kept, count(len(scores)), best, chosen, product.short))
    header = ("round", "restored in all", "measured", "best, with recall gained per remaining KL", "chosen", _SOURCE)
    caption = f"The search: {sheet['search'].replace('_', ' ')}."
    if sheet["search"] == "pairs":
        caption += " The chosen layers have the largest sum of single values and of what pairs have beyond them."
    return Table(header, rows, caption, words=(*header[1:2], *header[3:]))


def choice_summary(products: Products) -> str | None:
    """Summary of the choice: layers, criterion, cost. None if no layers were chosen after align."""
    sheet = products.choice
    if sheet is None:
        return None
    chosen, numbers = sheet["attention_layers"], sheet["numbers"]
    layers = f"layer{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}"
    if sheet["choose"] == "difficulty":
        return f"Softmax attention in {layers}, whose mixers fitted it worst during align."
    # restored() gives the reason. "Stage by stage" measures the model that distill starts from.
    positions = (
        ""
        if sheet.get("attention_rope", True)
        else " Scored with the teacher's rotary positions; the student has none, so it starts distill with worse "
        "scores."
    )
    return (
        f"Softmax attention in {layers}, chosen by the recall that they restore relative to the remaining KL "
        f"({sheet['probe']['answers']} answers, {count(sheet['probe']['text_tokens'])} held-out tokens). Recall went "
        f"from {plain(numbers['recall_before'])} to {plain(numbers['recall_after'])} nats per token (teacher "
        f"{plain(numbers['recall_teacher'])}), KL from {plain(numbers['kl_before'])} to {plain(numbers['kl_after'])}. "
        f"The choice used {count(numbers['tokens'])} tokens of forward passes, {percent(numbers['token_share'], 2)} of "
        f"the run's.{_teacher_note(numbers)}{positions}"
    )


def _teacher_note(numbers: dict[str, Any]) -> str:
    if numbers["accuracy_teacher"] >= _PASSED:
        return ""
    return (
        f" The teacher itself answers only {percent(numbers['accuracy_teacher'])} of this probe, so the choice says "
        "little about recall (attention_layers.probe has others)."
    )


def choice_blocks(products: Products, pictures: tuple[str, ...] | list[str]) -> list[Block]:
    """Blocks for the report; empty if no layers were chosen after align."""
    table, summary = choice_table(products), choice_summary(products)
    if table is None or summary is None:
        return []
    blocks: list[Block] = [Heading("Layers that stay attention"), Text(summary)]
    if "choose.png" in pictures:
        blocks.append(Picture("choose.png", "Scores of every layer", "The chosen layers are filled."))
    rounds = rounds_table(products)
    return [*blocks, table, *(() if rounds is None else (rounds,))]
