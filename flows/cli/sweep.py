"""`radlads sweep`."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radlads.flows.cli.application import (
    ERR,
    EXAMPLE,
    Overrides,
    StorePlace,
    TrackingPlace,
    WorkPlace,
    app,
    parse_overrides,
    say,
)
from radlads.tasks.contracts.errors import UserError

if TYPE_CHECKING:
    from radlads.tasks.contracts.store.base import Store

Yes = Annotated[bool, typer.Option("--yes", help="Start a sweep of more than 64 runs.")]


@app.command(epilog=EXAMPLE.format("radlads sweep smoke --run rates --grid distill.mixer_rate.start=1e-3,2e-3"))
def sweep(
    recipe: Annotated[str | None, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=VALUE,VALUE", help="Values to try, e.g. --grid distill.tokens=1e6,2e6."),
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option("--run", help="Name of the sweep; the same name continues it.")] = None,
    deployments: Annotated[
        bool, typer.Option("--deployments", help="All runs at once, as runs of Prefect's deployment `full`.")
    ] = False,
    stop_on_failure: Annotated[
        bool, typer.Option("--stop-on-failure", help="Start no more runs once one has failed.")
    ] = False,
    table: Annotated[str | None, typer.Option(metavar="NAME", help="Only print the table of a sweep.")] = None,
    yes: Yes = False,
    store: StorePlace = None,
    tracking: TrackingPlace = None,
    work: WorkPlace = None,
) -> None:
    """Run a recipe with every combination of some values. Stages that runs have in common run once."""
    from radlads.flows import services
    from radlads.flows.foreground import command_line, end_in_foreground, failure_of
    from radlads.tasks.contracts.settings import check_run_name, resolve_settings
    from radlads.tasks.contracts.store.layout import check_layout
    from radlads.tasks.contracts.store.open import find_store, open_store

    if table is not None:
        if recipe is not None or grid or overrides:
            raise UserError("--table prints the table of an existing sweep: leave out the recipe, --grid and --set")
        place = find_store(resolve_settings(store=store).store)
        check_layout(place)
        _print_table(place, table)
        return
    if recipe is None:
        raise UserError("name a recipe, e.g. radlads sweep smoke --grid distill.tokens=1e6,2e6")
    from radlads.tasks.sweep.grid import MOST_MEMBERS, make_members, parse_grid
    from radlads.tasks.sweep.record import check_record

    # A faulty recipe is reported at once, before Prefect is started.
    values, changes = parse_grid(grid or []), parse_overrides(overrides)
    if name is not None:
        check_run_name(name)
    named = name or f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    members = make_members(recipe, values, changes, named, most=None if yes else MOST_MEMBERS)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    place = open_store(settings.store)
    check_layout(place)
    check_record(place, named, recipe, members)
    tracking = tracking and (settings.tracking or "none")  # without the password, which stays in this process
    services.use_services(settings.home)
    with ERR.status("starting Prefect"):
        from radlads.flows.common import orchestrator
        from radlads.flows.sweep import SweepFailed, flow_of, radlads_sweep
        from radlads.flows.sweep_deployments import check_deployment

    grids, sets = [("--grid", one) for one in grid or []], [("--set", pair) for pair in overrides or []]
    places: list[tuple[str, str | None]] = [("--store", store), ("--tracking", tracking), ("--work", work)]
    asked = {"--deployments": deployments, "--stop-on-failure": stop_on_failure, "--yes": yes}
    flags = [flag for flag, given in asked.items() if given]
    again = command_line("sweep", recipe, *flags, options=[*grids, ("--run", named), *sets, *places])
    parameters: dict[str, Any] = {"recipe": recipe, "sweep": named, "grid": values, "overrides": changes or None}
    parameters |= {"deployments": deployments, "stop_on_failure": stop_on_failure}
    parameters |= {"store": store, "tracking": tracking, "work": work}
    with orchestrator():
        if deployments:
            check_deployment(flow_of(members).name)
        state = end_in_foreground(radlads_sweep, parameters, again, err=ERR)
        failed = not state.is_completed()
        if failed and not isinstance(state.result(raise_on_failure=False), SweepFailed):
            raise failure_of(state, again)
    _print_table(place, named)
    if failed:
        ERR.print(f"{state.message}; to continue: {again}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _print_table(store: Store, name: str) -> None:
    from radlads.tasks.sweep.record import read_record
    from radlads.tasks.sweep.table import kept_failures, make_table

    say(make_table(store, name, read_record(store, name), kept_failures(store, name)).markdown())
