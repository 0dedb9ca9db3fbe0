"""`radlads`, the command. Imports are kept inside the commands: Prefect reads its settings as it is imported."""

from __future__ import annotations

import io
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from radlads.flows import services
from radlads.flows.cli_store import store_app
from radlads.flows.foreground import command_line, run_in_foreground
from radlads.flows.plan_view import plan_offline, print_plan
from radlads.flows.service_password import password_file
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.parsing.files import explain_os_error
from radlads.tasks.contracts.parsing.yaml_reader import parse_yaml
from radlads.tasks.contracts.recipe.recipe import list_recipes, load_recipe
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
from radlads.tasks.contracts.settings import check_run_name, resolve_settings
from radlads.tasks.contracts.store.open import StoreError, open_store
from radlads.tasks.launchers.launcher import JobCrashed

app = typer.Typer(
    name="radlads",
    help="Convert softmax-attention language models into linear-attention models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
services_app = typer.Typer(
    help="The Prefect server, its worker and the MLflow server, on loopback.", no_args_is_help=True
)
app.add_typer(services_app, name="services")
app.add_typer(store_app, name="store")

_TWIN = "tiny-"
_out = Console()
_err = Console(stderr=True)

RecipeName = Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value, e.g. --set distill.tokens=1e6."),
]
StorePlace = Annotated[str | None, typer.Option(help="s3://bucket/prefix or a folder; .radlads/store by default.")]
TrackingPlace = Annotated[str | None, typer.Option(help="MLflow: http://..., sqlite:///file.db, or none.")]


def main() -> None:
    """Entry point. Exit code 2 and a line each: errors that the user can mend; 1 and one line: others that we know."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow locale must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as error:
        _fail(str(error).splitlines(), 2)
    except (JobCrashed, StoreError) as error:
        _fail(str(error).splitlines()[:1], 1)
    except BrokenPipeError:  # whoever read our output left, as `head` does
        _close_stdout()
        sys.exit(1)
    except OSError as error:
        _fail([explain_os_error(error)], 2)


def _fail(lines: list[str], code: int) -> NoReturn:
    for line in lines:
        _err.print(f"error: {hide(line)}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _close_stdout() -> None:
    """What is still buffered has no reader; the interpreter would try to write it as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    table = Table("recipe", "what it is", box=None, header_style="bold")
    names = list_recipes()
    twins = [name for name in names if name.startswith(_TWIN) and name.removeprefix(_TWIN) in names]
    for name in names:
        if name not in twins:
            mark = " *" if _TWIN + name in twins else ""
            table.add_row(name + mark, escape(" ".join(load_recipe(name).description.split())))
    _out.print(table)
    _out.print(f"* has a twin for trying and testing, {_TWIN}NAME: the same but for its sizes", style="dim")


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Plan for so many GPUs instead of this machine.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of each of those GPUs.")] = None,
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="From the teacher's config alone: no weights, no text.")
    ] = False,
) -> None:
    """Check a recipe and show what it would take: sizes, memory, steps. Runs nothing else and keeps nothing."""
    asked = anchor_recipe(load_recipe(recipe, parse_overrides(overrides)), recipe, Path.cwd())
    with _out.status("planning"):
        report = plan_offline(asked, gpus=gpus, gpu_memory_gib=gpu_memory, sizes_only=sizes_only)
    print_plan(_out, asked, report)
    if report.misfits:
        raise UserError("\n".join(report.misfits))


@app.command()
def run(
    recipe: RecipeName,
    name: Annotated[str | None, typer.Option("--run", help="Name of the run; the same name continues it.")] = None,
    overrides: Overrides = None,
    store: StorePlace = None,
    tracking: TrackingPlace = None,
    work: Annotated[str | None, typer.Option(help="Folder for running jobs.")] = None,
) -> None:
    """Run the pipeline in this process, with the services if they are up. Run it again to go on after a failure."""
    changes = parse_overrides(overrides)
    asked = load_recipe(recipe, changes)  # said at once when it is wrong, before Prefect is started
    if name is not None:
        check_run_name(name)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    open_store(settings.store)  # said before Prefect takes its time, too
    tracking = tracking and (settings.tracking or "none")  # without the password, which stays in this process
    services.use_services(settings.home)
    from radlads.flows.common import orchestrator
    from radlads.flows.convert import radlads
    from radlads.flows.pretrain import radlads_pretrain

    flow = radlads_pretrain if asked.pretrain else radlads
    name = name or f"{asked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    places: list[tuple[str, str | None]] = [("--store", store), ("--tracking", tracking), ("--work", work)]
    again = command_line("run", recipe, options=[("--run", name), *(("--set", p) for p in overrides or []), *places])
    parameters: dict[str, Any] = {"recipe": recipe, "run": name, "overrides": changes or None}
    parameters |= {"store": store, "tracking": tracking, "work": work}
    with orchestrator():
        made = run_in_foreground(flow, parameters, again, err=_err)
    for stage, uri in made.items():
        _out.print(f"{stage:12} {uri}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    judged_run: Annotated[str, typer.Argument(help="Name of the finished run whose models are judged.")],
    recipe: Annotated[
        str | None, typer.Option(help="Judge by this recipe instead of the one that the run was made by.")
    ] = None,
    name: Annotated[str | None, typer.Option("--run", help="Name of the judgement; the same continues it.")] = None,
    overrides: Overrides = None,
    store: StorePlace = None,
    tracking: TrackingPlace = None,
    work: Annotated[str | None, typer.Option(help="Folder for running jobs.")] = None,
    other_teacher: Annotated[
        bool, typer.Option("--other-teacher", help="The teacher may be another one than the models were made from.")
    ] = False,
) -> None:
    """Judge a finished run again: other tasks, lengths or data (--set), the same teacher."""
    changes = parse_overrides(overrides)
    check_run_name(judged_run)
    from radlads.tasks.pipeline import finished_students, recipe_of_run

    # Said at once when it is wrong, before Prefect is started.
    if recipe is not None:
        load_recipe(recipe, changes)
    else:
        recipe_of_run(judged_run, changes, store=store)
    if name is not None:
        check_run_name(name)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    finished_students(open_store(settings.store), judged_run)  # said before Prefect takes its time, too
    tracking = tracking and (settings.tracking or "none")  # without the password, which stays in this process
    services.use_services(settings.home)
    from radlads.flows.common import orchestrator
    from radlads.flows.evaluate import radlads_evaluate

    name = name or f"{judged_run}-judged-{datetime.now():%Y%m%d-%H%M%S}"
    places: list[tuple[str, str | None]] = [("--store", store), ("--tracking", tracking), ("--work", work)]
    options = [("--recipe", recipe), ("--run", name), *(("--set", pair) for pair in overrides or []), *places]
    flags = ["--other-teacher"] if other_teacher else []
    again = command_line("evaluate", judged_run, *flags, options=options)
    parameters = {"judged_run": judged_run, "recipe": recipe, "run": name, "overrides": changes or None, "store": store,
                  "tracking": tracking, "work": work, "other_teacher": other_teacher}  # fmt: skip
    with orchestrator():
        made = run_in_foreground(radlads_evaluate, parameters, again, err=_err)
    for stage, uri in made.items():
        _out.print(f"{stage:12} {uri}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def sync(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    store: StorePlace = None,
    tracking: TrackingPlace = None,
) -> None:
    """Send MLflow what it lacks of a run's numbers, after an outage; a run that ends does that by itself."""
    from radlads.tasks.mirror import sync_run

    check_run_name(name)
    services.use_services(resolve_settings().home)
    settings = resolve_settings(store=store, tracking=tracking)
    if not settings.tracking:
        raise UserError("there is no MLflow to send anything to: --tracking is 'none'")
    stages = sync_run(open_store(settings.store), settings.tracking, name)
    _out.print(f"MLflow has all of {name}: {', '.join(stages)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    recipe: Annotated[str, typer.Option(help="Recipe to run instead of the smoke recipe.")] = "smoke",
    name: Annotated[str | None, typer.Option("--run", help="Name of the run.")] = None,
    overrides: Overrides = None,
) -> None:
    """Start the services, convert the shipped teacher through them, and say where everything is."""
    changes = parse_overrides(overrides)
    asked = load_recipe(recipe, changes)
    if recipe.endswith((".yaml", ".yml")):
        recipe = str(Path(recipe).absolute())  # the worker has a working directory of its own
    if name is not None:
        check_run_name(name)
    home = resolve_settings().home
    with _out.status("starting Prefect and MLflow"):
        running = services.services_up(home)
    from radlads.flows.common import orchestrator
    from radlads.flows.demo import run_demo

    name = name or f"{asked.name}-{datetime.now():%Y%m%d-%H%M%S}"
    options = [("--recipe", recipe), ("--run", name), *(("--set", pair) for pair in overrides or [])]
    again = command_line("demo", options=options)
    with orchestrator():
        code = run_demo(_out, running, resolve_settings(), recipe, name, changes, again)
    sys.exit(code)


@services_app.command("up")
def up() -> None:
    """Start what does not run yet and wait until it answers."""
    with _out.status("starting Prefect and MLflow"):
        running = services.services_up(resolve_settings().home)
    _show(running)


@services_app.command("down")
def down() -> None:
    """Stop them. Runs, results and the MLflow history stay."""
    stopped = services.services_down(resolve_settings().home)
    _out.print(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


@services_app.command("status")
def status() -> None:
    """Say what runs; the exit code is 0 when all of it answers."""
    running = services.read_services(resolve_settings().home)
    _show(running)
    healthy = len(running) == 3 and all(services.is_healthy(service) for service in running.values())
    sys.exit(0 if healthy else 1)


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
        changes[key] = parse_yaml(text, where=f"--set {one_line(key, 60)}")
    return changes


@services_app.command("env")
def env() -> None:
    """Print what a shell needs to reach them, their password included: eval "$(radlads services env)"."""
    for line in services.shell_settings(resolve_settings().home):
        _out.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(running: dict[str, services.Service]) -> None:
    table = Table("service", "where", "process", "log", box=None, header_style="bold")
    for name in ("prefect", "mlflow", "worker"):
        service = running.get(name)
        if service is None:
            table.add_row(name, "[red]not running", "", "")
        else:
            table.add_row(name, service.url or "", str(service.pid), service.log)
    _out.print(table)
    if running:
        where = password_file(resolve_settings().home)
        _out.print(f"Both pages ask for user and password: {where}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
