"""The typer application, and the parts that its commands share: consoles, options, parsing of `--set`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.parsing.yaml_reader import parse_value

app = typer.Typer(
    name="radlads",
    help="Convert softmax-attention language models into linear-attention models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXAMPLE = "Example: {}"
"""The epilogue of a command's --help."""
OUT = Console()
ERR = Console(stderr=True)

RecipeName = Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value, e.g. --set distill.tokens=1e6."),
]
StorePlace = Annotated[str | None, typer.Option(help="s3://bucket/prefix or a folder; .radlads/store by default.")]
TrackingPlace = Annotated[str | None, typer.Option(help="MLflow: http://..., sqlite:///file.db, or none.")]
WorkPlace = Annotated[str | None, typer.Option(help="Folder in which jobs run.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run; `radlads runs` lists them.")]
OptionalRun = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Name of the run; the one at work, or the newest, by default.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]
FetchTeacher = Annotated[
    bool, typer.Option("--fetch-teacher", help="Download the teacher's package first, where the recipe names one.")
]


def parse_overrides(pairs: list[str] | None) -> dict[str, Any]:
    """["a.b=1"] → {"a.b": 1}; values are YAML, and 1e6 is a number. Raises UserError."""
    changes: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            written = one_line(hide(pair), 60)
            raise UserError(f"--set {written}: write it as KEY=VALUE, e.g. --set distill.tokens=1000000")
        if key in changes:
            raise UserError(f"--set {one_line(key, 60)} is given twice; leave one of them out")
        changes[key] = parse_value(text, where=f"--set {one_line(key, 60)}")
    return changes


def say(text: str) -> None:
    """Print one line on stdout, unformatted."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)
