"""The flow `radlads-pretrain`: train a small teacher with the training loop of the conversion."""

from __future__ import annotations

from functools import partial

from prefect import flow

from radlads.flows.approval import approval_over
from radlads.flows.common import explain_errors, run_identity
from radlads.flows.form import Address, Dollars, Folder, Overrides, RunName, TeacherRecipeChoice, title_of_pretraining
from radlads.tasks.announce import run_announced
from radlads.tasks.graph import pretrain
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.stage_tasks import PrefectRunner


@flow(name="radlads-pretrain", flow_run_name=title_of_pretraining, persist_result=False)
@explain_errors
def radlads_pretrain(
    recipe: TeacherRecipeChoice,
    run: RunName = None,
    overrides: Overrides = None,
    store: Address = None,
    tracking: Address = None,
    work: Folder = None,
    approve_over: Dollars = None,
) -> dict[str, str]:
    """Train a small teacher from nothing, by the section `pretrain` of a recipe.

    Args:
        recipe: A shipped recipe by its name, or the path of a YAML file of yours on the worker's machine.
        run: Name of the run, under which the store, the pages and the commands know it. The same name continues it.
            Without one: the recipe's name and a few digits.
        overrides: Changes to the recipe, dotted key → value: `{"distill.tokens": 200000000}`.
        store: Where products are kept: a folder of the worker's machine, or `s3://bucket/prefix`. Without one:
            RADLADS_STORE of the worker.
        tracking: MLflow's address, `sqlite:///file.db`, `wandb:PROJECT`, or `none`. Without one: RADLADS_TRACKING of
            the worker.
        work: Folder of the worker's machine in which jobs run. Without one: RADLADS_WORK of the worker.
        approve_over: Dollars. The run waits for your Resume before a stage that is estimated to cost more; this needs
            `resources.dollars_per_gpu_hour` in the recipe. Without it nothing is asked.

    Returns:
        Stage → uri of its product, and `run` → the run's name.
    """
    with open_pipeline(
        recipe, overrides=overrides, run=run, run_id=run_identity(), store=store, tracking=tracking, work=work
    ) as pipeline:
        graph, approve = partial(pretrain, pipeline.recipe), approval_over(approve_over)
        made = run_announced(pipeline, PrefectRunner(pipeline), graph, approve)
        return {"run": pipeline.run, **{stage: product.uri for stage, product in made.items()}}
