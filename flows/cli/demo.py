"""`radlads demo`."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from radlads.flows.cli.application import EXAMPLE, OUT, Overrides, app, parse_overrides
from radlads.tasks.contracts.errors import UserError


def quick_changes() -> dict[str, Any]:
    """What `--quick` makes of the smoke recipe: a sixth of its tokens, one dataset, no third stage, no needles."""
    from radlads.tasks.contracts.stages import FINETUNE, NEEDLE

    return {
        "align.data": "stories",
        "align.tokens": 65_536,
        "distill.data": "stories",
        "distill.tokens": 98_304,
        FINETUNE.name: None,
        "evaluate.heldout_tokens": 8_192,
        NEEDLE.name: None,
    }


@app.command(epilog=EXAMPLE.format("radlads demo --quick"))
def demo(
    recipe: Annotated[str, typer.Option(help="Recipe to run instead of the smoke recipe.")] = "smoke",
    quick: Annotated[
        bool, typer.Option("--quick", help="A sixth of the training: to see every page, not a good student.")
    ] = False,
    name: Annotated[str | None, typer.Option("--run", help="Name of the run.")] = None,
    overrides: Overrides = None,
) -> None:
    """Start the services, convert the shipped teacher through them, and print where the results are."""
    from radlads.flows import services
    from radlads.flows.foreground import command_line
    from radlads.tasks.contracts.recipe.recipe import load_recipe
    from radlads.tasks.contracts.settings import check_run_name, resolve_settings

    changes = parse_overrides(overrides)
    if quick and recipe != "smoke":
        raise UserError("--quick shortens the smoke recipe; a recipe of your own is shortened with --set")
    changes = {**(quick_changes() if quick else {}), **changes}
    asked = load_recipe(recipe, changes)
    if recipe.endswith((".yaml", ".yml")):
        recipe = str(Path(recipe).absolute())  # the worker has another working directory
    if name is not None:
        check_run_name(name)
    home = resolve_settings().home
    with OUT.status("starting Prefect and MLflow"):
        running = services.services_up(home)
    from radlads.flows.common import orchestrator
    from radlads.flows.demo import run_demo

    name = name or f"{asked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    options = [("--recipe", recipe), ("--run", name), *(("--set", pair) for pair in overrides or [])]
    again = command_line("demo", *(["--quick"] if quick else []), options=options)
    with orchestrator():
        code = run_demo(OUT, running, resolve_settings(), recipe, name, changes, again)
    sys.exit(code)
