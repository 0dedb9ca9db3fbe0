"""`radlads status` and `radlads runs`: where runs stand, by the store alone."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from radlads.flows.cli.application import (
    EXAMPLE,
    OUT,
    AsJson,
    OptionalRun,
    StorePlace,
    app,
    look_again,
    say,
    until_interrupted,
)

if TYPE_CHECKING:
    from radlads.tasks.contracts.store.base import Store
    from radlads.tasks.look.run_state import RunState

_LOOK_SECONDS = 5.0


@app.command(epilog=EXAMPLE.format("radlads status my-run --watch"))
def status(
    run: OptionalRun = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every five seconds, until it ends.")] = False,
    as_json: AsJson = False,
    store: StorePlace = None,
) -> None:
    """Show where a run stands: stages, progress, time to go, speed, loss, cost so far, and on which machine."""
    from radlads.flows.run_view import print_run
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.look.run_state import find_run, look

    place = find_store(resolve_settings(store=store).store)
    with OUT.status(f"reading {place.uri}"):
        name = find_run(place, run)
        state = look(place, name)
    if watch:
        with until_interrupted():
            sys.exit(_watch(place, state, as_json))
    if as_json:
        say(json.dumps(state.as_json(), indent=1))
    else:
        print_run(OUT, state)


@app.command(epilog=EXAMPLE.format("radlads runs --store s3://bucket/prefix"))
def runs(as_json: AsJson = False, store: StorePlace = None) -> None:
    """List all runs of a store: how far they are, whether they are at work, and where they stopped."""
    from radlads.flows.run_view import runs_table
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.look.all_runs import look_at_all

    place = find_store(resolve_settings(store=store).store)
    with OUT.status(f"reading {place.uri}"):
        found = look_at_all(place)
    if as_json:
        say(json.dumps([state.as_json() for state in found], indent=1))
    elif not found:
        say(f"{place.uri} has no runs yet: `radlads run RECIPE` makes one")
    else:
        OUT.print(runs_table(found, OUT.width))


def _watch(place: Store, state: RunState, as_json: bool) -> int:
    """Show a run until it ends; the exit code: 0 if it has finished, else 1. On a terminal one table is renewed,
    elsewhere a line is printed for each change."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from radlads.flows.run_view import headline, plain_line, stage_table, summary

    said = ""
    with nullcontext() if as_json or not OUT.is_terminal else Live(console=OUT, auto_refresh=False) as live:
        while True:
            if live is not None:
                lines = map(Text.from_markup, headline(state))
                live.update(Group(*lines, stage_table(state, OUT.width), summary(state)), refresh=True)
            elif as_json:
                say(json.dumps(state.as_json()))
            elif plain_line(state) != said:
                said = plain_line(state)
                say(said)
            if not state.is_alive:
                break
            time.sleep(_LOOK_SECONDS)
            state = look_again(place, state)
    return 0 if state.word == "finished" else 1
