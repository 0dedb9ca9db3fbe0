"""The flow `radlads-evaluate`: evaluate a finished model again, with other tasks, lengths or data."""

from __future__ import annotations

from functools import partial
from typing import Any

from prefect import flow

from radlads.flows.common import Address, explain_errors, run_identity
from radlads.tasks.announce import run_announced
from radlads.tasks.graph import judge
from radlads.tasks.look.record import keep_places
from radlads.tasks.pipeline import open_pipeline, recipe_of_run, students_to_judge
from radlads.tasks.stage_tasks import PrefectRunner


@flow(name="radlads-evaluate", persist_result=False)
@explain_errors
def radlads_evaluate(
    judged_run: str,
    recipe: str | None = None,
    run: str | None = None,
    overrides: dict[str, Any] | None = None,
    store: Address | None = None,
    tracking: Address | None = None,
    work: str | None = None,
    other_teacher: bool = False,
) -> dict[str, str]:
    """Evaluate the models of the run `judged_run` by the sections `evaluate` and `needle` of a recipe.

    recipe: by default the recipe of `judged_run`. run: the name of this evaluation, a run of its own; the evaluated run
    is not changed. other_teacher: allow a recipe whose teacher is not the one that the models were converted from;
    without it, that is refused. The other parameters are those of the flow `radlads`.
    """
    asked = recipe_of_run(judged_run, overrides, store=store) if recipe is None else recipe
    with open_pipeline(
        asked, overrides=overrides, run=run, run_id=run_identity(), store=store, tracking=tracking, work=work
    ) as pipeline:
        students = students_to_judge(pipeline, judged_run)
        keep_places(pipeline.store, pipeline.run, pipeline.settings, judged=judged_run, other_teacher=other_teacher)
        graph = partial(judge, pipeline.recipe, students=students, other_teacher=other_teacher)
        judged = run_announced(pipeline, PrefectRunner(pipeline), graph)
        return {"run": pipeline.run, **{stage: product.uri for stage, product in judged.items()}}
