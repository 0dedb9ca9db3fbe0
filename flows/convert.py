"""The flow `radlads`: from a teacher to a judged, exported student."""

from __future__ import annotations

from typing import Any

from prefect import flow

from radlads.flows.common import Address, explain_errors, run_identity
from radlads.tasks.assess import evaluate, needle
from radlads.tasks.contracts.recipe.choice import late_choice
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.prepare import plan, tokenize, transplant
from radlads.tasks.report import publish
from radlads.tasks.training import align, choose, distill, finetune


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
    """Convert the recipe's teacher. Stages that the recipe does not have are left out.

    recipe: the name of a shipped recipe, or the path of a YAML file. run: a name for what this run makes; the same name
    continues it. overrides: dotted key → value, e.g. {"distill.tokens": 1000000}. store: `s3://bucket/prefix` or a
    folder. tracking: an MLflow server's address, `sqlite:///file.db`, or `none`. work: folder for running jobs.
    Returns stage → uri of its product, and `run` → the run's name.
    """
    places = {"store": store, "tracking": tracking, "work": work}
    with open_pipeline(recipe, overrides=overrides, run=run, run_id=run_identity(), **places) as pipeline:
        wanted = pipeline.recipe

        planned = plan(pipeline)
        data = {name: tokenize(pipeline, planned, name=name) for name in wanted.datasets_used}

        students = {"transplant": transplant(pipeline, planned)}
        if wanted.align:
            students["align"] = align(pipeline, planned, data, students["transplant"])
        if late_choice(wanted):
            students["choose"] = choose(pipeline, planned, data, students["align"])
        if wanted.distill:
            students["distill"] = distill(pipeline, planned, data, last(students))
        if wanted.finetune:
            students["finetune"] = finetune(pipeline, planned, data, last(students))

        judging = {}
        if wanted.evaluate:
            judging["evaluate"] = evaluate.submit(pipeline, planned, data, students)
        if wanted.needle:
            judging["needle"] = needle.submit(pipeline, planned, students)
        judged = {stage: future.result() for stage, future in judging.items()}

        datasets = {f"{name} data": product for name, product in data.items()}
        made = {"plan": planned.product, **datasets, **students, **judged}
        made["publish"] = publish(pipeline, made)
        return {"run": pipeline.run, **{stage: product.uri for stage, product in made.items()}}


def last(students: dict[str, Any]) -> Any:
    """The newest student."""
    return students[list(students)[-1]]
