"""`radlads plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from radlads.flows.cli.application import OUT, FetchTeacher, Overrides, RecipeName, app, parse_overrides, say
from radlads.flows.fetch_teacher import fetch_teacher
from radlads.flows.plan_view import plan_offline, print_plan
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.packaged import at_fetched_teacher
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
from radlads.tasks.contracts.settings import resolve_settings


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Plan for this number of GPUs instead of this machine's.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of each of these GPUs in GiB.")] = None,
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="Use the teacher's config alone: read no weights, no text.")
    ] = False,
    fetch: FetchTeacher = False,
) -> None:
    """Check a recipe and print its sizes, memory and steps. Runs no other stage and stores nothing."""
    asked = anchor_recipe(load_recipe(recipe, parse_overrides(overrides)), recipe, Path.cwd())
    home = resolve_settings().home
    if fetch:
        fetch_teacher(asked, home, say)
    asked = at_fetched_teacher(asked, home)
    with OUT.status("planning"):
        report = plan_offline(asked, gpus=gpus, gpu_memory_gib=gpu_memory, sizes_only=sizes_only)
    print_plan(OUT, asked, report)
    if report.misfits:
        raise UserError("\n".join(report.misfits))
