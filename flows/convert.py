"""The flow `radlads`: from a teacher to an evaluated, exported student."""

from __future__ import annotations

from functools import partial
from typing import Any

from prefect import flow

from radlads.flows.common import Address, explain_errors, run_identity
from radlads.tasks.announce import run_announced
from radlads.tasks.graph import convert
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.stage_tasks import PrefectRunner


@flow(name="radlads", persist_result=False)
@explain_errors
def radlads(
    recipe: str = "smoke",
    run: str | None = None,
    overrides: dict[str, Any] | None = None,
    store: Address | None = None,
    tracking: Address | None = None,
    work: str | None = None,
) -> dict[str, str]:
    """Convert the recipe's teacher. Stages that are not in the recipe are skipped.

    recipe: the name of a shipped recipe, or the path of a YAML file. run: the run's name; the same name continues it.
    overrides: dotted key → value, e.g. {"distill.tokens": 1000000}. store: `s3://bucket/prefix` or a folder. tracking:
    an MLflow server's address, `sqlite:///file.db`, or `none`. work: folder in which jobs run. Returns stage → uri of
    its product, and `run` → the run's name.
    """
    with open_pipeline(
        recipe, overrides=overrides, run=run, run_id=run_identity(), store=store, tracking=tracking, work=work
    ) as pipeline:
        made = run_announced(pipeline, PrefectRunner(pipeline), partial(convert, pipeline.recipe))
        return {"run": pipeline.run, **{stage: product.uri for stage, product in made.items()}}
