"""The flow `radlads-pretrain`: train a small teacher with the training loop of the conversion."""

from __future__ import annotations

from functools import partial
from typing import Any

from prefect import flow

from radlads.flows.common import Address, explain_errors, run_identity
from radlads.tasks.announce import run_announced
from radlads.tasks.graph import pretrain
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.stage_tasks import PrefectRunner


@flow(name="radlads-pretrain", persist_result=False)
@explain_errors
def radlads_pretrain(
    recipe: str = "demo-teacher",
    run: str | None = None,
    overrides: dict[str, Any] | None = None,
    store: Address | None = None,
    tracking: Address | None = None,
    work: str | None = None,
) -> dict[str, str]:
    """Train the recipe's `pretrain` section from nothing. The parameters are those of the flow `radlads`."""
    with open_pipeline(
        recipe, overrides=overrides, run=run, run_id=run_identity(), store=store, tracking=tracking, work=work
    ) as pipeline:
        made = run_announced(pipeline, PrefectRunner(pipeline), partial(pretrain, pipeline.recipe))
        return {"run": pipeline.run, **{stage: product.uri for stage, product in made.items()}}
