"""`radlads compare`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radlads.flows.cli.application import EXAMPLE, OUT, AsJson, RunNames, StorePlace, app, say

if TYPE_CHECKING:
    from radlads.tasks.look.compare import Comparison
    from radlads.tasks.look.results import Score

_PAGE = "radlads.tasks.jobs.report.compared.page"
_UNALIKE = "The runs were judged by other data or settings: their results are not of the same thing."
_ERRORS = "± is one standard error; of a difference as if both were independent, which is too much on the same texts."


@app.command(epilog=EXAMPLE.format("radlads compare first second"))
def compare(
    runs: RunNames,
    as_json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page in the style of a run's report.")
    ] = None,
    store: StorePlace = None,
) -> None:
    """Show what differs between runs: in their recipes, then in their results, with errors, and what each took."""
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.look import compare as comparing

    place = find_store(resolve_settings(store=store).store)
    with OUT.status(f"reading {place.uri}"):
        found = comparing.compare(place, runs)
    if html is not None:
        _write_page(found, html)
    elif as_json:
        say(json.dumps(found.as_json(), indent=1))
    else:
        _print(found)


def _write_page(found: Comparison, target: Path) -> None:
    from radlads.tasks.contracts.errors import UserError
    from radlads.tasks.contracts.parsing.files import file_errors

    with file_errors(str(target)), tempfile.TemporaryDirectory(prefix="radlads-compare-") as folder:
        source = Path(folder, "comparison.json")
        source.write_text(json.dumps(found.as_json()), encoding="utf-8")
        command = [sys.executable, "-m", _PAGE, str(source), str(Path(folder, "page.html"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the page was not made: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
        target.write_bytes(Path(folder, "page.html").read_bytes())
    say(str(target))


def _print(found: Comparison) -> None:
    from radlads.flows.run_view import side_by_side
    from radlads.tasks.plan_table import short_count
    from radlads.tasks.sweep.grid import plain_value

    if found.recipe:
        rows = {key: [plain_value(value) for value in values] for key, values in found.recipe.items()}
        OUT.print(side_by_side("recipe", found.runs, rows, OUT.width))
    else:
        say("The recipes are alike.")
    if found.shared:
        say(f"shared   {', '.join(found.shared)}")
    headings = list(found.runs)
    if len(found.runs) == 2 and found.results:
        headings.append("difference")
    rows = {heading: [_number(score) for score in scores] for heading, scores in found.results.items()}
    if "difference" in headings:
        rows = {heading: [*cells, _difference(found, heading)] for heading, cells in rows.items()}
    if rows:
        OUT.print()
        OUT.print(side_by_side("result", headings, rows, OUT.width))
        if any(score is not None and score.stderr is not None for scores in found.results.values() for score in scores):
            OUT.print(_ERRORS, style="dim")
        if not found.judged_alike:
            OUT.print(_UNALIKE, style="yellow")
    else:
        say("None of them has results yet.")
    if found.took:
        took = {
            name: ["" if v is None else short_count(v) if name.endswith("tokens") else f"{v:,.2f}" for v in values]
            for name, values in found.took.items()
        }
        OUT.print()
        OUT.print(side_by_side("took", found.runs, took, OUT.width))


def _number(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}")


def _difference(found: Comparison, heading: str) -> str:
    one = found.difference(heading)
    if one is None:
        return ""
    text = f"{one.value:+.3g}" + ("" if one.stderr is None else f" ± {one.stderr:.2g}")
    if one.is_sure is False:
        return f"{text} (within error)"
    return text if one.is_better is None else f"{text} ({'better' if one.is_better else 'worse'})"
