"""What a run that has finished says at the terminal: its products, its verdicts, what it took, what can be done now."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress

from rich.console import Console
from rich.markup import escape

from radlads.flows.run_view import summary
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.stages import PUBLISH, STUDENT_STAGES
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.look.report import REPORT_PAGE
from radlads.tasks.look.run_state import look

VERDICTS = "verdicts.json"
"""Of the product of publish: a list of {level, text}, the most serious first."""
_MARKS = {"good": "[green]✓[/]", "warning": "[yellow]![/]", "note": "[dim]·[/]"}
_MOST_VERDICTS = 6


def say_end(out: Console, say: Callable[[str], None], store: Store, run: str, made: Mapping[str, str]) -> None:
    """Print the end of a run. made: stage → uri of its product. say: prints one plain line on stdout. Products and the
    next commands go to stdout; the verdicts are read from the report's product, if this version made it."""
    for stage, uri in made.items():
        say(f"{stage:12} {uri}")
    with suppress(StoreError, UserError, OSError, ValueError):  # the run has finished whatever the store says now
        _say_more(out, say, store, run, made)


def _say_more(out: Console, say: Callable[[str], None], store: Store, run: str, made: Mapping[str, str]) -> None:
    product = made.get(PUBLISH.name)
    if product is not None:
        key = store.key(product)
        print_verdicts(out, store, key)
    say(summary(look(store, run, layout_checked=True)))
    if product is not None:
        page = f"   {store.root / key / REPORT_PAGE}" if isinstance(store, LocalStore) else ""
        say(f"report   radlads report {run}{page}")
    if product is not None and any(stage in made for stage in STUDENT_STAGES):
        say(f"use      radlads chat {run}   radlads serve {run}   radlads export {run} --to FOLDER")


def print_verdicts(out: Console, store: Store, key: str) -> None:
    """The most serious verdicts of a report, a line each. key: of its product. Raises StoreError."""
    for verdict in _read_verdicts(store, key)[:_MOST_VERDICTS]:
        mark = _MARKS.get(verdict.get("level", ""), _MARKS["note"])
        out.print(f"{mark} {escape(verdict.get('text', ''))}", highlight=False)


def _read_verdicts(store: Store, key: str) -> list[dict[str, str]]:
    """Most serious first; none if another version made the report."""
    data = store.get_bytes(f"{key}/{VERDICTS}")
    return [] if data is None else list(json.loads(data))
