"""The report's pages on what a run was made from: the teacher's file, the data, and every product."""

from __future__ import annotations

from radlads.tasks.contracts.stages import DEQUANTIZE
from radlads.tasks.jobs.report.number_format import NONE, count, percent, plain
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Heading, Table, Text

_SOURCE = "source"


def origin_blocks(products: Products) -> list[Block]:
    """The teacher's file (of a GGUF teacher), the data, the provenance."""
    return [*_teacher_file(products), *_data(products), *_provenance(products)]


def _teacher_file(products: Products) -> list[Block]:
    product = products.of_stage(DEQUANTIZE.name)
    if product is None or products.plan is None or products.plan.gguf is None:
        return []
    file = products.plan.gguf
    return [Heading("The teacher's file"), Text(f"`{file.name}`: {file}. Source: {product.short}.")]


def _data(products: Products) -> list[Block]:
    rows = []
    for product in products.datasets:
        numbers = product.manifest.metrics
        rows.append(
            (
                product.manifest.spec.get("name", product.name),
                count(numbers.get("train_tokens")),
                count(numbers.get("heldout_tokens")),
                count(numbers.get("documents")),
                plain(numbers.get("bytes_per_token"), 2),
                product.short,
            )
        )
    header = ("dataset", "training tokens", "held-out tokens", "documents", "bytes per token", _SOURCE)
    table = Table(header, rows, words=(_SOURCE,))
    return [Heading("Data"), table, *_mixtures(products)] if rows else []


def _mixtures(products: Products) -> list[Block]:
    rows = []
    for product in products.datasets:
        spec, numbers = product.manifest.spec, product.manifest.metrics
        tokens, passes = (numbers.get(f"source_{name}", ()) for name in ("tokens", "passes"))
        for index, (read, times) in enumerate(zip(tokens, passes, strict=True)):
            source = spec["dataset"]["sources"][index]
            weight, share = plain(source["weight"], 3), percent(read / max(1, sum(tokens)))
            rows.append(
                (spec["name"], f"{index}, {source['kind']}", weight, count(read), share, plain(times, 2), product.short)
            )
    header = ("dataset", "its source", "weight", "training tokens", "share", "times read", _SOURCE)
    caption = "Mixtures by weight. A number of times above 1 means that documents occur more than once."
    return [Table(header, rows, caption, words=(_SOURCE,))] if rows else []


def _provenance(products: Products) -> list[Block]:
    rows = []
    for product in (*products.datasets, *products.stages):
        manifest = product.manifest
        code = (manifest.code.sha or "installed package")[:12] + (" (changed)" if manifest.code.dirty else "")
        rows.append(
            (
                manifest.stage,
                f"`{manifest.digest}`",
                f"{manifest.created_at:%Y-%m-%d %H:%M} UTC",
                f"`{manifest.mlflow_run_id}`" if manifest.mlflow_run_id else NONE,
                code,
            )
        )
    versions = products.final.manifest.code.versions
    with_versions = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    header = ("stage", "digest", "committed", "MLflow run", "code")
    return [
        Heading("Provenance"),
        Table(header, rows, "A digest covers the settings of a stage and the digests of its inputs.", words=header),
        Text(f"Versions: {with_versions}."),
    ]
