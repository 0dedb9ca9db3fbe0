"""`radlads stop`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from radlads.flows.cli.application import ERR, EXAMPLE, OUT, RunName, StorePlace, app, say


@app.command(epilog=EXAMPLE.format("radlads stop my-run"))
def stop(
    run: RunName,
    wait: Annotated[float, typer.Option(help="Seconds to wait until it has stopped; 0: do not wait.", min=0)] = 120.0,
    store: StorePlace = None,
) -> None:
    """Stop a run, here or on another machine: its jobs save a checkpoint, and `radlads resume` continues it."""
    from radlads.flows.run_view import plain_line
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.look.run_state import look
    from radlads.tasks.look.stop_run import ask_to_stop, wait_until_stopped

    place = find_store(resolve_settings(store=store).store)
    asked = ask_to_stop(place, look(place, run))
    say(asked.text)
    if asked.how == "nothing" or wait == 0:
        return
    with OUT.status("waiting for its checkpoint"):
        stopped = wait_until_stopped(place, run, asked, wait, say)
    state = look(place, run)
    if not stopped:
        text = f"{plain_line(state)}: it has not stopped after {wait:.0f} s"
        ERR.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    say(f"{plain_line(state)}; to continue: radlads resume {run}" if state.word != "finished" else plain_line(state))
