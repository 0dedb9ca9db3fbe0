"""`radlads services`: up, down, status, env."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from radlads.flows.cli.application import EXAMPLE, OUT, app, say

if TYPE_CHECKING:
    from radlads.flows import services

services_app = typer.Typer(
    help="The Prefect server, its worker and the MLflow server, on loopback.", no_args_is_help=True
)
app.add_typer(services_app, name="services")


@services_app.command("up", epilog=EXAMPLE.format("radlads services up"))
def up() -> None:
    """Start the services that do not run yet and wait until they answer."""
    from radlads.flows import services
    from radlads.tasks.contracts.settings import resolve_settings

    with OUT.status("starting Prefect and MLflow"):
        running = services.services_up(resolve_settings().home)
    _show(running)


@services_app.command("down", epilog=EXAMPLE.format("radlads services down"))
def down() -> None:
    """Stop the services. Runs, results and the MLflow history stay."""
    from radlads.flows import services
    from radlads.tasks.contracts.settings import resolve_settings

    stopped = services.services_down(resolve_settings().home)
    OUT.print(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


@services_app.command("status", epilog=EXAMPLE.format("radlads services status"))
def status() -> None:
    """Show which services run; the exit code is 0 if all of them answer."""
    from radlads.flows import services
    from radlads.tasks.contracts.settings import resolve_settings

    running = services.read_services(resolve_settings().home)
    _show(running)
    healthy = len(running) == 3 and all(services.is_healthy(service) for service in running.values())
    sys.exit(0 if healthy else 1)


@services_app.command("env", epilog=EXAMPLE.format('eval "$(radlads services env)"'))
def env() -> None:
    """Print the variables that a shell needs to reach them, password included: eval "$(radlads services env)"."""
    from radlads.flows import services
    from radlads.tasks.contracts.settings import resolve_settings

    for line in services.shell_settings(resolve_settings().home):
        say(line)


def _show(running: dict[str, services.Service]) -> None:
    from rich.table import Table

    from radlads.flows.service_password import password_file
    from radlads.tasks.contracts.settings import resolve_settings

    table = Table("service", "where", "process", "log", box=None, header_style="bold")
    for name in ("prefect", "mlflow", "worker"):
        service = running.get(name)
        if service is None:
            table.add_row(name, "[red]not running", "", "")
        else:
            table.add_row(name, service.url or "", str(service.pid), service.log)
    OUT.print(table)
    if running:
        where = password_file(resolve_settings().home)
        say(f"Both pages ask for user and password: {where}")
