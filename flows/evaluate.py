"""The flow `radlads-evaluate`: evaluate a finished model again, with other tasks, lengths or data."""

from __future__ import annotations

from functools import partial

from prefect import flow

from radlads.flows.approval import approval_over
from radlads.flows.common import explain_errors, run_identity
from radlads.flows.form import Address, Dollars, Folder, Overrides, RecipeChoice, RunName, title_of_evaluation
from radlads.tasks.announce import run_announced
from radlads.tasks.graph import judge
from radlads.tasks.look.record import keep_places
from radlads.tasks.pipeline import open_pipeline, recipe_of_run, students_to_judge
from radlads.tasks.stage_tasks import PrefectRunner


@flow(name="radlads-evaluate", flow_run_name=title_of_evaluation, persist_result=False)
@explain_errors
def radlads_evaluate(
    judged_run: str,
    recipe: RecipeChoice | None = None,
    run: RunName = None,
    overrides: Overrides = None,
    store: Address = None,
    tracking: Address = None,
    work: Folder = None,
    other_teacher: bool = False,
    approve_over: Dollars = None,
) -> dict[str, str]:
    """Evaluate a finished run again, by the sections `evaluate` and `needle` of a recipe. That run is not changed.

    Args:
        judged_run: Name of the run whose models are evaluated.
        recipe: A shipped recipe by its name, or the path of a YAML file of yours on the worker's machine. Without one:
            the recipe of the evaluated run.
        run: Name of this evaluation, which is a run of its own. The same name continues it.
            Without one: the recipe's name and a few digits.
        overrides: Changes to the recipe, dotted key → value: `{"distill.tokens": 200000000}`.
        store: Where products are kept: a folder of the worker's machine, or `s3://bucket/prefix`. Without one:
            RADLADS_STORE of the worker.
        tracking: MLflow's address, `sqlite:///file.db`, `wandb:PROJECT`, or `none`. Without one: RADLADS_TRACKING of
            the worker.
        work: Folder of the worker's machine in which jobs run. Without one: RADLADS_WORK of the worker.
        approve_over: Dollars. The run waits for your Resume before a stage that is estimated to cost more; this needs
            `resources.dollars_per_gpu_hour` in the recipe. Without it nothing is asked.
        other_teacher: Allow a recipe whose teacher is not the one that the models were converted from.

    Returns:
        Stage → uri of its product, and `run` → the name of this evaluation.
    """
    asked = recipe_of_run(judged_run, overrides, store=store) if recipe is None else recipe
    with open_pipeline(
        asked, overrides=overrides, run=run, run_id=run_identity(), store=store, tracking=tracking, work=work
    ) as pipeline:
        students = students_to_judge(pipeline, judged_run)
        keep_places(pipeline.store, pipeline.run, pipeline.settings, judged=judged_run, other_teacher=other_teacher)
        graph = partial(judge, pipeline.recipe, students=students, other_teacher=other_teacher)
        judged = run_announced(pipeline, PrefectRunner(pipeline), graph, approval_over(approve_over))
        return {"run": pipeline.run, **{stage: product.uri for stage, product in judged.items()}}
