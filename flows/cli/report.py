"""`radlads report`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from radlads.flows.cli.application import ERR, EXAMPLE, OUT, RunName, StorePlace, WorkPlace, app, say


@app.command(epilog=EXAMPLE.format("radlads report my-run"))
def report(
    run: RunName,
    show: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open it in a browser; at a desktop by default.")
    ] = None,
    store: StorePlace = None,
    work: WorkPlace = None,
) -> None:
    """Print the path of a run's report, and open it. If it has none, make one of what the run has finished so far."""
    from radlads.flows.run_view import plain_line
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.look.report import find_report, make_report, page_of
    from radlads.tasks.look.run_state import look

    settings = resolve_settings(store=store, work=work)
    place = find_store(settings.store)
    state = look(place, run)
    product = find_report(state)
    if product is None:
        text = f"{plain_line(state)}: its report is made of what it has finished"
        ERR.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
        with OUT.status("making the report"):
            product = make_report(place, state, settings)
    page = page_of(place, product, settings.home / "reports" / run)
    say(str(page))
    if show if show is not None else _has_desktop():
        _open(page)


def _has_desktop() -> bool:
    has_display = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and has_display


def _open(page: Path) -> None:
    import webbrowser

    if not webbrowser.open(page.as_uri()):
        ERR.print("no browser was found; open the file by hand", style="dim")
