"""`radlads plan`: the plan of a recipe, made without the orchestrator and shown as a table."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from radlads.tasks.job import StoreRef
from radlads.tasks.launch import machine_resources
from radlads.tasks.plan_table import plan_rows
from radlads.tasks.recipe import Recipe
from radlads.tasks.specs import PlanReport, PlanSpec
from radlads.tasks.stage import StageRequest, run_stage
from radlads.tasks.store import LocalStore


def plan_offline(recipe: Recipe) -> PlanReport:
    """Run the plan job in a folder that is thrown away. Raises JobFailed with what is wrong with the recipe."""
    with tempfile.TemporaryDirectory(prefix="radlads-plan-") as folder:
        store = LocalStore(StoreRef(uri=f"{folder}/store"))
        request = StageRequest(
            stage="plan",
            run="plan",
            recipe=recipe.name,
            spec=PlanSpec(recipe=recipe),
            inputs={},
            output_key="plan",
            store=store,
            resources=machine_resources(recipe.resources),
            scratch=Path(folder, "work"),
        )
        run_stage(request)
        return PlanReport.model_validate_json(store.read_file("plan", "plan.json"))


def print_plan(out: Console, recipe: Recipe, report: PlanReport) -> None:
    """Teacher, student, a row a stage, and what to be warned of."""
    kept = ", ".join(str(layer) for layer in report.attention_layers) or "none"
    if report.choice is not None:
        kept = f"{report.choice.count}, chosen by {report.choice.choose} after align"
    out.print(f"[bold]{recipe.name}[/]: {' '.join(recipe.description.split())}")
    if report.teacher is not None:
        out.print(
            f"teacher   {report.teacher.path}, {report.teacher_parameters:,} parameters, {report.num_layers} layers"
        )
        out.print(
            f"student   {recipe.student.variant}, {report.student_parameters:,} parameters, "
            f"{report.mixer_parameters:,} in mixers; layers that stay attention: {kept}"
        )
    rows = plan_rows(report)
    table = Table(*(rows[0] if rows else ()), box=None, header_style="bold")
    for row in rows:
        table.add_row(*row.values())
    out.print(table)
    if report.gpu_hours is not None:
        price = f", about {report.dollars:,.2f} dollars" if report.dollars is not None else ""
        out.print(f"in all    {report.gpu_hours:,.1f} GPU hours{price} (estimated)")
    for warning in report.warnings:
        out.print(f"[yellow]warning[/]   {warning}")
