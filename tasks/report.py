"""publish: the report, the model card, and the exported folder."""

from __future__ import annotations

from collections.abc import Mapping

from radlads.tasks.contracts.specs import PublishSpec
from radlads.tasks.contracts.tracking import log_file
from radlads.tasks.observe import show_markdown
from radlads.tasks.perform import perform, stage_task
from radlads.tasks.pipeline import Pipeline
from radlads.tasks.stage import Product


@stage_task("publish")
def publish(pipeline: Pipeline, products: Mapping[str, Product]) -> Product:
    """Make what is handed over. products: stage or dataset → product; the job tells them apart by their manifests."""
    spec = PublishSpec(section=pipeline.recipe.publish, recipe=pipeline.recipe)
    product = perform(pipeline, "publish", spec, products)
    text = pipeline.store.read_file(pipeline.store.key(product.uri), "report.md")
    show_markdown(pipeline.run, "report", text.decode(), f"Report of {pipeline.run}")
    log_file(pipeline.parent, "report.md", text)
    return product
