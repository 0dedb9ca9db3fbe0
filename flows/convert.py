"""The flow `radlads`: from a teacher to an evaluated, exported student."""

from __future__ import annotations

from functools import partial

from prefect import flow

from radlads.flows.approval import approval_over
from radlads.flows.common import explain_errors, run_identity
from radlads.flows.form import Address, Dollars, Folder, Overrides, RecipeChoice, RunName, title_of_conversion
from radlads.tasks.announce import run_announced
from radlads.tasks.graph import convert
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.stage_tasks import PrefectRunner


@flow(name="radlads", flow_run_name=title_of_conversion, persist_result=False)
@explain_errors
def radlads(
    recipe: RecipeChoice,
    run: RunName = None,
    overrides: Overrides = None,
    store: Address = None,
    tracking: Address = None,
    work: Folder = None,
    approve_over: Dollars = None,
) -> dict[str, str]:
    """Convert the recipe's teacher into a linear-attention student. Stages that are not in the recipe are skipped.

    Args:
        recipe: What is converted, and how: a shipped recipe by its name, or the path of a YAML file of yours on the
            worker's machine.
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
        graph, approve = partial(convert, pipeline.recipe), approval_over(approve_over)
        made = run_announced(pipeline, PrefectRunner(pipeline), graph, approve)
        return {"run": pipeline.run, **{stage: product.uri for stage, product in made.items()}}
