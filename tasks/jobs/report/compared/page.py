"""The program of `radlads compare --html`: the comparison of runs as a page in the style of a run's report.

`python -m radlads.tasks.jobs.report.compared.page comparison.json page.html`; the first file is what `radlads compare
--json` prints. Needs no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radlads.tasks.jobs.report.html_page import render_html
from radlads.tasks.jobs.report.number_format import NONE, count, measured, plain
from radlads.tasks.jobs.report.report_blocks import Block, Heading, Table, Text, Verdict

_ERRORS = (
    "± is one standard error; of a difference as if both runs were judged independently, which is too much where both "
    "read the same texts. A difference of less than two of them is within error."
)
_UNALIKE = "The runs were judged by other data or settings: their results are not of the same thing."


def main() -> None:
    """Read the comparison, write the page."""
    source, target = map(Path, sys.argv[1:3])
    found: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    target.write_text(render_html(f"Runs {_names(found['runs'])}", build_page(found), target.parent), encoding="utf-8")


def build_page(found: dict[str, Any]) -> list[Block]:
    """The blocks: what is concluded, results, recipes, what they took."""
    return [*_verdicts(found), *_results(found), *_recipes(found), *_costs(found)]


def _verdicts(found: dict[str, Any]) -> Iterator[Verdict]:
    if not found["judged_alike"]:
        yield Verdict("warning", _UNALIKE)
    if len(found["runs"]) != 2 or not found["results"]:
        return
    second = found["runs"][1]
    sure = {h: d for h, d in found["difference"].items() if d["is_sure"] and d["is_better"] is not None}
    for word, level, wanted in (("better", "good", True), ("worse", "note", False)):
        names = [heading for heading, one in sure.items() if one["is_better"] is wanted]
        if names:
            yield Verdict("good" if level == "good" else "note", f"`{second}` is {word} in {_names(names)}")
    if not any(one["stderr"] is not None for one in found["difference"].values()):
        yield Verdict("note", "no result that both runs have comes with an error, so no difference is judged")
    elif not sure:
        yield Verdict("note", "no result differs by more than two standard errors")


def _results(found: dict[str, Any]) -> Iterator[Block]:
    yield Heading("Results")
    if not found["results"]:
        yield Text("None of the runs has results yet.")
        return
    two = len(found["runs"]) == 2
    rows = []
    for heading, scores in found["results"].items():
        row = [heading, *(measured(score) for score in scores)]
        rows.append([*row, _difference(found["difference"].get(heading))] if two else row)
    header = ["result", *found["runs"], *(["difference"] if two else [])]
    yield Table(header, rows, _ERRORS)


def _difference(one: dict[str, Any] | None) -> str:
    if one is None:
        return NONE
    sign = "+" if one["value"] >= 0 else ""
    if one["is_sure"] is False:
        judged = "within error"
    else:
        judged = {True: "better", False: "worse", None: ""}[one["is_better"]]
    return f"{sign}{measured(one)}{f', {judged}' if judged else ''}"


def _recipes(found: dict[str, Any]) -> Iterator[Block]:
    yield Heading("Recipes")
    if found["recipe"]:
        rows = [[f"`{key}`", *(_value(value) for value in values)] for key, values in found["recipe"].items()]
        yield Table(
            ["key", *found["runs"]], rows, "Keys that are alike in all runs are left out.", tuple(found["runs"])
        )
    else:
        yield Text("The recipes are alike.")
    if found["shared"]:
        yield Text(f"The runs share the products of {_names(found['shared'])}.")


def _costs(found: dict[str, Any]) -> Iterator[Block]:
    if found["took"]:
        yield Heading("What they took")
        rows = [
            [name, *(count(value) if name.endswith("tokens") else plain(value, 2) for value in values)]
            for name, values in found["took"].items()
        ]
        yield Table(["", *found["runs"]], rows, "Of all products of a run, whichever run made them.")


def _value(value: Any) -> str:
    return NONE if value is None else value if isinstance(value, str) else json.dumps(value)


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


if __name__ == "__main__":
    main()
