"""The typer application, and the parts that its commands share: consoles, options, parsing of `--set`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.document import one_line

if TYPE_CHECKING:
    from radlads.tasks.contracts.store.base import Store
    from radlads.tasks.look.run_state import RunState

app = typer.Typer(
    name="radlads",
    help="Convert softmax-attention language models into linear-attention models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
EXAMPLE = "Example: {}"
"""The epilogue of a command's --help."""
OUT = Console(emoji=False)  # `demo:llama:` is no llama
ERR = Console(stderr=True, emoji=False)


def _runs_like(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell's completion: names of runs of the store that was typed, or of the default one."""
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.layout import run_names
    from radlads.tasks.contracts.store.open import StoreError, find_store

    try:
        names = run_names(find_store(resolve_settings(store=context.params.get("store")).store))
    except (UserError, StoreError, OSError):  # a shell has no place to say why
        return []
    return [name for name in names if name.startswith(incomplete)]


def _recipes_like(incomplete: str) -> list[str]:
    """For the shell's completion: names of shipped recipes; files are completed by the shell."""
    from radlads.tasks.contracts.recipe.recipe import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.", autocompletion=_recipes_like)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value, e.g. --set distill.tokens=1e6."),
]
StorePlace = Annotated[str | None, typer.Option(help="s3://bucket/prefix or a folder; .radlads/store by default.")]
TrackingPlace = Annotated[
    str | None, typer.Option(help="MLflow: http://..., sqlite:///file.db; wandb:PROJECT; or none.")
]
WorkPlace = Annotated[str | None, typer.Option(help="Folder in which jobs run.")]
RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Name of the run; `radlads runs` lists them.", autocompletion=_runs_like),
]
OptionalRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="Name of the run; the one at work, or the newest, by default.",
        autocompletion=_runs_like,
    ),
]
RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN RUN...", help="Names of two or more runs.", autocompletion=_runs_like),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def _dollars(value: float | None) -> float | None:
    if value is not None and not 0 <= value < inf:  # nothing costs more than nan
        raise UserError("--approve-over: give dollars, 0 or more, e.g. --approve-over 50")
    return value


ApproveOver = Annotated[
    float | None,
    typer.Option(metavar="DOLLARS", callback=_dollars, help="Ask before a stage that is estimated to cost more."),
]
FetchTeacher = Annotated[
    bool, typer.Option("--fetch-teacher", help="Download the teacher's package first, where the recipe names one.")
]


def _say_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        say(f"radlads {metadata.version('radlads')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Convert softmax-attention language models into linear-attention models."""


def parse_overrides(pairs: list[str] | None) -> dict[str, Any]:
    """["a.b=1"] → {"a.b": 1}; values are YAML, and 1e6 is a number. Raises UserError."""
    from radlads.tasks.contracts.parsing.yaml_reader import parse_value

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


def absolute_template(name: str | None) -> str | None:
    """A chat template's file for a program that runs elsewhere; template:NAME stays as it is."""
    return name if name is None or name.startswith("template:") else str(Path(name).absolute())


def check_device(device: str) -> None:
    """Raises UserError unless a `Device` is one that there is."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: choose auto, cpu or cuda")


def checked_options(kind: Any, values: dict[str, Any]) -> Any:
    """A sheet of options. Raises UserError, naming the option."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        said = str(fault["msg"]).removeprefix("Value error, ")
        named = f"--{str(fault['loc'][0]).replace('_', '-')}: " if fault["loc"] else ""
        raise UserError(named + said) from error


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C is how a user ends what goes on for ever: without a word, exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def look_again(place: Store, before: RunState) -> RunState:
    """The state of a run now; as it was while the store does not answer, which is said."""
    from radlads.tasks.contracts.store.errors import StoreError
    from radlads.tasks.look.run_state import look

    try:
        return look(place, before.run)
    except StoreError as error:
        text = f"trying again: {hide(str(error)).splitlines()[0]}"
        ERR.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
        return before


def say(text: str) -> None:
    """Print one line on stdout, unformatted."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)
