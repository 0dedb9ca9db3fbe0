"""`radlads run`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from radlads.flows.cli.application import (
    ERR,
    EXAMPLE,
    OUT,
    ApproveOver,
    FetchTeacher,
    Overrides,
    RecipeName,
    StorePlace,
    TrackingPlace,
    WorkPlace,
    app,
    parse_overrides,
    say,
)


@app.command(epilog=EXAMPLE.format("radlads run smoke --run first --set distill.tokens=1e6"))
def run(
    recipe: RecipeName,
    name: Annotated[str | None, typer.Option("--run", help="Name of the run; the same name continues it.")] = None,
    overrides: Overrides = None,
    store: StorePlace = None,
    tracking: TrackingPlace = None,
    work: WorkPlace = None,
    fetch: FetchTeacher = False,
    approve_over: ApproveOver = None,
) -> None:
    """Run the pipeline in this process, with the services if they are up. Run it again to continue after a failure."""
    from radlads.flows import services
    from radlads.flows.foreground import command_line, run_in_foreground
    from radlads.tasks.contracts.pins.packaged import at_fetched_teacher
    from radlads.tasks.contracts.recipe.recipe import load_recipe
    from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
    from radlads.tasks.contracts.settings import check_run_name, resolve_settings
    from radlads.tasks.contracts.store.layout import check_layout
    from radlads.tasks.contracts.store.open import open_store

    changes = parse_overrides(overrides)
    asked = load_recipe(recipe, changes)  # a faulty recipe is reported before Prefect is started
    if name is not None:
        check_run_name(name)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    here = anchor_recipe(asked, recipe, Path.cwd())
    if fetch:
        from radlads.flows.fetch_teacher import fetch_teacher

        fetch_teacher(here, settings.home, say)
    at_fetched_teacher(here, settings.home)  # a missing teacher is reported before Prefect is started, too
    place = open_store(settings.store)
    check_layout(place)  # checked before the slow start of Prefect, too
    tracking = tracking and (settings.tracking or "none")  # without the password, which stays in this process
    services.use_services(settings.home)
    with ERR.status("starting Prefect"):  # its import takes seconds
        from radlads.flows.closing import say_end
        from radlads.flows.common import orchestrator
        from radlads.flows.convert import radlads
        from radlads.flows.live_view import LiveTable
        from radlads.flows.pretrain import radlads_pretrain

    flow = radlads_pretrain if asked.pretrain else radlads
    name = name or f"{asked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    places: list[tuple[str, str | None]] = [("--store", store), ("--tracking", tracking), ("--work", work)]
    places.append(("--approve-over", None if approve_over is None else f"{approve_over:g}"))
    again = command_line("run", recipe, options=[("--run", name), *(("--set", p) for p in overrides or []), *places])
    parameters: dict[str, Any] = {"recipe": recipe, "run": name, "overrides": changes or None}
    parameters |= {"store": store, "tracking": tracking, "work": work, "approve_over": approve_over}
    with orchestrator():
        made = run_in_foreground(flow, parameters, again, err=ERR, shown=LiveTable(ERR, place, name))
    say_end(OUT, say, place, name, made)
