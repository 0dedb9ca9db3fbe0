"""`radlads logs`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from radlads.flows.cli.application import (
    ERR,
    EXAMPLE,
    RunName,
    StorePlace,
    WorkPlace,
    app,
    look_again,
    say,
    until_interrupted,
)

if TYPE_CHECKING:
    from pathlib import Path

    from radlads.tasks.contracts.store.base import Store
    from radlads.tasks.look.logs import LogReader
    from radlads.tasks.look.run_state import RunState
    from radlads.tasks.look.stage_state import StageState

_LINE_SECONDS = 1.0
_STATE_SECONDS = 5.0


@app.command(epilog=EXAMPLE.format("radlads logs my-run distill --follow"))
def logs(
    run: RunName,
    stage: Annotated[
        str | None, typer.Argument(help="Stage, e.g. distill or tokenize-train; the one at work by default.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines, until it ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Of what is there: the last N; 0: all.")] = 100,
    store: StorePlace = None,
    work: WorkPlace = None,
) -> None:
    """Print the log of a stage's job: from its machine as it grows, from elsewhere as the store has it."""
    from radlads.tasks.contracts.errors import UserError
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.look.logs import stage_of, stage_to_show
    from radlads.tasks.look.run_state import look

    settings = resolve_settings(store=store, work=work)
    place = find_store(settings.store)
    state = look(place, run)
    chosen = stage_to_show(state) if stage is None else stage_of(state, stage)
    if (chosen is None or not chosen.product) and not (follow and state.is_alive):
        what = "no stage has begun" if chosen is None else f"'{chosen.label}' has not begun"
        raise UserError(f"the run '{run}' is {state.word}; {what}, so there is no log yet")
    if follow:
        with until_interrupted():
            _follow(place, state, stage, settings.work, lines)
    elif chosen is not None:
        _show(place, chosen, settings.work, lines)


def _show(place: Store, stage: StageState, work: Path, lines: int) -> None:
    from radlads.tasks.contracts.errors import UserError
    from radlads.tasks.look.logs import open_log

    reader = open_log(place, stage, work)
    text = reader.new().splitlines()
    if not text:
        raise UserError(f"{stage.label} ({stage.word}) has no log in {reader.where}")
    _say_where(stage, reader.where)
    for line in text[-lines:] if lines else text:
        say(line)


def _follow(place: Store, state: RunState, name: str | None, work: Path, lines: int) -> None:
    """Print what is added: to one stage until it has ended, or to whichever is at work until the run has."""
    from radlads.tasks.look.logs import open_log, stage_of, stage_to_show

    readers: dict[str, LogReader] = {}
    while True:
        stage = stage_to_show(state) if name is None else stage_of(state, name)
        if stage is not None and stage.product and stage.word != "to do":
            if stage.product not in readers:
                readers[stage.product] = open_log(place, stage, work)
                _say_where(stage, readers[stage.product].where)
                there = readers[stage.product].new().splitlines()
                for line in there[-lines:] if lines else there:
                    say(line)
            elif readers[stage.product].folder is None:  # the job may have begun to write here since
                readers[stage.product].folder = open_log(place, stage, work).folder
        end = time.monotonic() + _STATE_SECONDS
        for reader in readers.values():
            if reader.folder is None:
                _say_new(reader)
        while time.monotonic() < end:
            for reader in readers.values():
                if reader.folder is not None:
                    _say_new(reader)
            if not state.is_alive or (name is not None and stage is not None and stage.word == "done"):
                return
            time.sleep(_LINE_SECONDS)
        state = look_again(place, state)


def _say_new(reader: LogReader) -> None:
    from radlads.tasks.contracts.store.errors import StoreError

    with suppress(StoreError):  # it is read again
        for line in reader.new().splitlines():
            say(line)


def _say_where(stage: StageState, where: str) -> None:
    text = f"== {stage.label} ({stage.word}): {where}"
    ERR.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
