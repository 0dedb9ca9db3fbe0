"""What a choice of attention layers found, for the report and the model card."""

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
            "KL left",
            "recall gained per KL left",
            "answers right",
            "chosen",
            _SOURCE,
        )
        for row in sheet["layers"]:
            numbers = tuple(plain(row[key]) for key in ("recall_gained", "kl_saved", "kl", "score"))
            taken = f"yes, round {row['round']}" if row["chosen"] else ""
            rows.append((str(row["layer"]), *numbers, percent(row["accuracy"]), taken, product.short))
        caption = (
            "Each layer alone with the teacher's softmax again, before distill, on the choice's own probe. Recall: "
            "mean log-probability of the answers' tokens, nats; KL: nats a token of held-out text. A loss of recall is "
            "multiplied by the KL, not divided, so that less KL is better there too. Later rounds score what a layer "
            "adds to those chosen before."
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
    chosen, numbers = sheet["attention_layers"], sheet["numbers"]
    layers = f"layer{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}"
    if sheet["choose"] == "difficulty":
        return f"Softmax attention in {layers}, chosen by how badly their mixers learned during align."
    # restored() has the reason; what distill is given is measured under "Stage by stage".
    positions = (
        ""
        if sheet.get("attention_rope", True)
        else " Scored with the teacher's rotary positions; the student goes on without them, so it starts distill "
        "worse than that."
    )
    return (
        f"Softmax attention in {layers}, chosen by the recall that they give back for the KL that is left "
        f"({sheet['probe']['answers']} answers, {count(sheet['probe']['text_tokens'])} held-out tokens). Recall went "
        f"from {plain(numbers['recall_before'])} to {plain(numbers['recall_after'])} nats a token (teacher "
        f"{plain(numbers['recall_teacher'])}), KL from {plain(numbers['kl_before'])} to {plain(numbers['kl_after'])}. "
        f"It took {count(numbers['tokens'])} tokens of forward passes, {percent(numbers['token_share'], 2)} of the "
        f"run's.{positions}"
    )


def choice_blocks(products: Products, pictures: tuple[str, ...] | list[str]) -> list[Block]:
    """The report's part; nothing where nothing was chosen."""
    table, summary = choice_table(products), choice_summary(products)
    if table is None or summary is None:
        return []
    blocks: list[Block] = [Heading("Layers that stay attention"), Text(summary)]
    if "choose.png" in pictures:
        blocks.append(Picture("choose.png", "Scores of every layer", "The chosen layers are filled."))
    return [*blocks, table]
