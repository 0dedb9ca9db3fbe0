"""plan, tokenize, transplant: what comes before training."""

from __future__ import annotations

from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import follow_moves
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.contracts.tracking import run_url
from radlads.tasks.observe import show_link, show_table
from radlads.tasks.perform import perform, stage_task
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.plan_table import plan_rows
from radlads.tasks.stage import Product
from radlads.tasks.stage_specs import tokenize_spec, transplant_spec


@stage_task("plan")
def plan(pipeline: Pipeline) -> Plan:
    """Check every option and every size before anything runs, and pin the teacher and the corpus files."""
    product = perform(pipeline, "plan", pipeline.plan_spec(), {})
    report = read_plan(pipeline, product)
    show_table(pipeline.run, "plan", plan_rows(report), f"Plan of {pipeline.run}")
    show_link(pipeline.run, "mlflow", run_url(pipeline.parent), f"{pipeline.run} in MLflow")
    return Plan(product=product, report=report)


@stage_task("tokenize", run_name="tokenize {name}")
def tokenize(pipeline: Pipeline, plan: Plan, name: str) -> Product:
    """Make one of the recipe's datasets, or find it made by another run."""
    spec = tokenize_spec(pipeline.recipe, plan.report, name)
    return perform(pipeline, "tokenize", spec, {}, label=f"tokenize {name}")


@stage_task("transplant")
def transplant(pipeline: Pipeline, plan: Plan) -> Product:
    """Build the student from the teacher's weights."""
    spec = transplant_spec(pipeline.recipe, plan.report)
    return perform(pipeline, "transplant", spec, {})


def read_plan(pipeline: Pipeline, product: Product) -> PlanReport:
    """The report in a plan's product, with the places that the recipe names now. Raises UserError where one of them
    holds something else than what was planned with."""
    key = pipeline.store.key(product.uri)
    report = PlanReport.model_validate_json(pipeline.store.read_file(key, "plan.json"))
    return follow_moves(pipeline.recipe, report, ContentHashes(pipeline.settings.content_cache))
