"""What the watch of the training stages noticed and did, as a table and verdicts of the report."""

from __future__ import annotations

from radlads.tasks.contracts.events import Event
from radlads.tasks.contracts.stages import TRAINING_STAGES
from radlads.tasks.jobs.report.number_format import plain
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Heading, Table, Verdict

_WORDS = ("step", "noticed", "done", "source")


def watch_blocks(products: Products) -> list[Block]:
    """Every event of every training stage; empty if there was none."""
    rows = [
        (
            stage,
            str(event.step),
            event.kind.replace("_", " "),
            event.number,
            "not finite" if event.value is None else plain(event.value, 4),
            plain(event.threshold, 4),
            plain(event.median, 4),
            plain(event.spread, 4),
            event.done,
            source,
        )
        for stage, source, events in _events(products)
        for event in events
    ]
    if not rows:
        return []
    caption = (
        "Threshold, median and spread: of the steps compared with. After a rollback the curves above show the steps as "
        "they were repeated."
    )
    header = ("stage", "step", "noticed", "number", "value", "threshold", "median", "spread", "done", "source")
    return [Heading("Watch"), Table(header, rows, caption, words=(*_WORDS, "number"))]


def watch_verdicts(products: Products) -> list[Verdict]:
    """A note for every stage that was rolled back."""
    counts = {stage: sum(e.action == "rollback" for e in events) for stage, _, events in _events(products)}
    return [
        Verdict("note", f"In {stage} the training was rolled back {count} time{'s' * (count > 1)}; see Watch.")
        for stage, count in counts.items()
        if count
    ]


def _events(products: Products) -> list[tuple[str, str, list[Event]]]:
    """(stage, source, its events) of every training stage."""
    found = ((stage, products.of_stage(stage)) for stage in TRAINING_STAGES)
    return [
        (stage, product.short, [Event.model_validate(one) for one in product.manifest.metrics.get("events", ())])
        for stage, product in found
        if product is not None
    ]
