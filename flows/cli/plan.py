"""`radlads plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from radlads.flows.cli.application import (
    EXAMPLE,
    OUT,
    FetchTeacher,
    Overrides,
    RecipeName,
    app,
    parse_overrides,
    say,
)
from radlads.tasks.contracts.errors import UserError


@app.command(epilog=EXAMPLE.format("radlads plan qwen3-8b-hybrid --gpus 8 --gpu-memory 80"))
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
    from radlads.flows import plan_view
    from radlads.tasks.contracts.pins.packaged import at_fetched_teacher
    from radlads.tasks.contracts.recipe.recipe import load_recipe
    from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
    from radlads.tasks.contracts.settings import resolve_settings

    asked = anchor_recipe(load_recipe(recipe, parse_overrides(overrides)), recipe, Path.cwd())
    home = resolve_settings().home
    if fetch:
        from radlads.flows.fetch_teacher import fetch_teacher

        fetch_teacher(asked, home, say)
    asked = at_fetched_teacher(asked, home)
    with OUT.status("planning"):
        report = plan_view.plan_offline(asked, gpus=gpus, gpu_memory_gib=gpu_memory, sizes_only=sizes_only)
    plan_view.print_plan(OUT, asked, report)
    if report.misfits:
        raise UserError("\n".join(report.misfits))
