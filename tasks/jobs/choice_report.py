"""What a choice of attention layers found, for the report and the model card."""

from __future__ import annotations

from radlads.tasks.jobs.blocks import Block, Heading, Picture, Table, Text
from radlads.tasks.jobs.numbers import count, percent, plain
from radlads.tasks.jobs.products import Products

_SOURCE = "source"


def choice_table(products: Products) -> Table | None:
    """Every layer's scores, the chosen ones marked; None where nothing was chosen after align."""
    sheet, product = products.choice, products.of_stage("choose")
    if sheet is None or product is None:
        return None
    rows: list[tuple[str, ...]] = []
    if sheet["choose"] == "recall":
        header: tuple[str, ...] = (
            "layer",
            "recall gained",
            "KL saved",
            "recall per KL",
            "answers right",
            "chosen",
            _SOURCE,
        )
        for row in sheet["layers"]:
            numbers = (plain(row["recall_gained"]), plain(row["kl_saved"]), plain(row["score"]))
            taken = f"yes, round {row['round']}" if row["chosen"] else ""
            rows.append((str(row["layer"]), *numbers, percent(row["accuracy"]), taken, product.short))
        caption = (
            "Each layer alone with the teacher's softmax again, before distill. Recall: nats a token of the answers; "
            "KL: nats a token of held-out text. Later rounds score what a layer adds to those chosen before."
        )
    else:
        header = ("layer", "difficulty", "align loss at the end", "chosen", _SOURCE)
        for row in sheet["layers"]:
            taken = "yes" if row["chosen"] else ""
            rows.append((str(row["layer"]), plain(row["score"]), plain(row["loss"]), taken, product.short))
        caption = "How badly each layer's mixer learned during align; chosen with their gaps in mind."
    return Table(header, rows, caption, words=("chosen", _SOURCE))


def choice_summary(products: Products) -> str | None:
    """One sentence: which layers, by what, at which cost."""
    sheet = products.choice
    if sheet is None:
        return None
    layers, numbers = ", ".join(map(str, sheet["attention_layers"])), sheet["numbers"]
    if sheet["choose"] == "difficulty":
        return f"Softmax attention in the layers {layers}, chosen by how badly their mixers learned during align."
    return (
        f"Softmax attention in the layers {layers}, chosen by the recall that they give back for the KL that is left "
        f"({sheet['probe']['answers']} answers, {count(sheet['probe']['text_tokens'])} held-out tokens). Recall went "
        f"from {plain(numbers['recall_before'])} to {plain(numbers['recall_after'])} nats a token (teacher "
        f"{plain(numbers['recall_teacher'])}), KL from {plain(numbers['kl_before'])} to {plain(numbers['kl_after'])}. "
        f"It took {count(numbers['tokens'])} tokens of forward passes, {percent(numbers['token_share'], 2)} of the "
        "run's."
    )


def choice_blocks(products: Products, pictures: tuple[str, ...] | list[str]) -> list[Block]:
    """The report's part; nothing where nothing was chosen."""
    table, summary = choice_table(products), choice_summary(products)
    if table is None or summary is None:
        return []
    blocks: list[Block] = [Heading("Layers that stay attention"), Text(summary)]
    if "choose.png" in pictures:
        blocks.append(Picture("choose.png", "Scores of every layer, the chosen ones filled", ""))
    return [*blocks, table]
