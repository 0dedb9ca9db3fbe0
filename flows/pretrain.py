"""The flow `radlads-pretrain`: make a small teacher with the training loop of the conversion."""

from __future__ import annotations

from typing import Any

from prefect import flow

from radlads.flows.common import Address, explain_errors, run_identity
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.prepare import plan, tokenize
from radlads.tasks.report import publish
from radlads.tasks.training import pretrain


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
    places = {"store": store, "tracking": tracking, "work": work}
    with open_pipeline(recipe, overrides=overrides, run=run, run_id=run_identity(), **places) as pipeline:
        section = pipeline.recipe.pretrain
        if section is None:
            raise UserError(
                f"the recipe '{pipeline.recipe.name}' has no section `pretrain`; run it with the flow radlads"
            )
        planned = plan(pipeline)
        data = {section.data: tokenize(pipeline, planned, name=section.data)}
        teacher = pretrain(pipeline, planned, data)
        made = {"plan": planned.product, f"{section.data} data": data[section.data], "pretrain": teacher}
        made["publish"] = publish(pipeline, made)
        return {"run": pipeline.run, **{stage: product.uri for stage, product in made.items()}}
