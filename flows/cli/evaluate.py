"""`radlads evaluate`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from radlads.flows.cli.application import (
    ERR,
    EXAMPLE,
    OUT,
    ApproveOver,
    Overrides,
    StorePlace,
    TrackingPlace,
    WorkPlace,
    app,
    parse_overrides,
    say,
)


@app.command(epilog=EXAMPLE.format("radlads evaluate my-run --set evaluate.heldout_tokens=1e6"))
def evaluate(
    judged_run: Annotated[str, typer.Argument(help="Name of the finished run whose models are evaluated.")],
    recipe: Annotated[str | None, typer.Option(help="Evaluate by this recipe instead of the run's own.")] = None,
    name: Annotated[
        str | None, typer.Option("--run", help="Name of this evaluation; the same name continues it.")
    ] = None,
    overrides: Overrides = None,
    store: StorePlace = None,
    tracking: TrackingPlace = None,
    work: WorkPlace = None,
    other_teacher: Annotated[
        bool, typer.Option("--other-teacher", help="Allow a teacher other than the one the models were made from.")
    ] = False,
    approve_over: ApproveOver = None,
) -> None:
    """Evaluate a finished run again: other tasks, lengths or data (--set), the same teacher."""
    from radlads.flows import services
    from radlads.flows.foreground import command_line, run_in_foreground
    from radlads.tasks.contracts.recipe.recipe import load_recipe
    from radlads.tasks.contracts.settings import check_run_name, resolve_settings
    from radlads.tasks.contracts.store.open import find_store

    changes = parse_overrides(overrides)
    check_run_name(judged_run)
    from radlads.tasks.pipeline import finished_students, recipe_of_run

    # A faulty recipe is reported at once, before Prefect is started.
    if recipe is not None:
        load_recipe(recipe, changes)
    else:
        recipe_of_run(judged_run, changes, store=store)
    if name is not None:
        check_run_name(name)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    place = find_store(settings.store)
    finished_students(place, judged_run)  # checked before the slow start of Prefect, too
    tracking = tracking and (settings.tracking or "none")  # without the password, which stays in this process
    services.use_services(settings.home)
    with ERR.status("starting Prefect"):
        from radlads.flows.closing import say_end
        from radlads.flows.common import orchestrator
        from radlads.flows.evaluate import radlads_evaluate
        from radlads.flows.live_view import LiveTable

    name = name or f"{judged_run}-judged-{datetime.now():%Y%m%d-%H%M%S}"
    places: list[tuple[str, str | None]] = [("--store", store), ("--tracking", tracking), ("--work", work)]
    places.append(("--approve-over", None if approve_over is None else f"{approve_over:g}"))
    options = [("--recipe", recipe), ("--run", name), *(("--set", pair) for pair in overrides or []), *places]
    flags = ["--other-teacher"] if other_teacher else []
    again = command_line("evaluate", judged_run, *flags, options=options)
    parameters = {"judged_run": judged_run, "recipe": recipe, "run": name, "overrides": changes or None, "store": store,
                  "tracking": tracking, "work": work, "other_teacher": other_teacher,
                  "approve_over": approve_over}  # fmt: skip
    with orchestrator():
        made = run_in_foreground(radlads_evaluate, parameters, again, err=ERR, shown=LiveTable(ERR, place, name))
    say_end(OUT, say, place, name, made)
