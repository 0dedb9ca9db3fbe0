"""The choice of attention layers as a table and text, for the report and the model card."""

from __future__ import annotations

from radlads.tasks.contracts.stages import CHOOSE
from radlads.tasks.jobs.report.number_format import count, percent, plain
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Heading, Picture, Table, Text

_SOURCE = "source"


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
            "recall gain is multiplied by the KL instead of divided by it, so that lower KL is always better. Later "
            "rounds score the gain over the layers chosen before."
        )
    else:
        header = ("layer", "difficulty", "align loss at the end", "chosen", _SOURCE)
        for row in sheet["layers"]:
            taken = "yes" if row["chosen"] else ""
            rows.append((str(row["layer"]), plain(row["score"]), plain(row["loss"]), taken, product.short))
        caption = "How poorly each layer's mixer fitted its attention during align; the gaps between layers count too."
    return Table(header, rows, caption, words=("chosen", _SOURCE))


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
        f"the run's.{positions}"
    )


def choice_blocks(products: Products, pictures: tuple[str, ...] | list[str]) -> list[Block]:
    """Blocks for the report; empty if no layers were chosen after align."""
    table, summary = choice_table(products), choice_summary(products)
    if table is None or summary is None:
        return []
    blocks: list[Block] = [Heading("Layers that stay attention"), Text(summary)]
    if "choose.png" in pictures:
        blocks.append(Picture("choose.png", "Scores of every layer", "The chosen layers are filled."))
    return [*blocks, table]
