"""`radlads doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from radlads.flows.cli.application import EXAMPLE, OUT, AsJson, StorePlace, TrackingPlace, WorkPlace, app, say

if TYPE_CHECKING:
    from pathlib import Path

    from radlads.tasks.look.doctor.finding import Finding

_STYLES = {"good": "green", "note": "dim", "warning": "yellow", "fault": "red"}


@app.command(epilog=EXAMPLE.format("radlads doctor --store s3://bucket/prefix"))
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels/--no-kernels", help="Compare every kernel with its reference; a minute on a CPU.")
    ] = True,
    seconds: Annotated[float, typer.Option(help="Longest time for that.", min=1)] = 300.0,
    as_json: AsJson = False,
    store: StorePlace = None,
    tracking: TrackingPlace = None,
    work: WorkPlace = None,
) -> None:
    """Check Python, GPUs, kernels, store, servers, disks, hub and clock; for what is wrong, say what mends it."""
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.look.doctor import machine, places

    settings = resolve_settings(store=store, tracking=tracking, work=work)
    checks: list[Callable[[], Iterable[Finding]]] = [
        machine.check_python,
        machine.check_gpus,
        lambda: machine.check_disks(settings.home, settings.work),
        lambda: places.check_store(settings.store),
        lambda: _check_servers(settings.home, settings.tracking),
        places.check_hub,
        lambda: places.check_clock(settings.store),
    ]
    if kernels:
        checks.append(lambda: machine.check_kernels(seconds))
    found: list[Finding] = []
    with ThreadPoolExecutor(max_workers=len(checks)) as pool:
        waiting = [pool.submit(lambda check: list(check()), check) for check in checks]
        for one in waiting:
            with nullcontext() if as_json else OUT.status("checking"):
                findings = one.result()
            found += findings
            if not as_json:
                for finding in findings:
                    _print(finding)
    if as_json:
        say(json.dumps([vars(finding) for finding in found], indent=1))
    else:
        faults, warnings = (sum(one.level == level for one in found) for level in ("fault", "warning"))
        say(f"faults: {faults}, warnings: {warnings}" if faults or warnings else "all is well")
    sys.exit(1 if any(finding.level == "fault" for finding in found) else 0)


def _check_servers(home: Path, tracking: str) -> Iterator[Finding]:
    from radlads.flows import services
    from radlads.tasks.contracts.errors import UserError
    from radlads.tasks.look.doctor.finding import Finding

    try:
        running = services.read_services(home)
    except UserError as error:
        yield Finding("servers", "fault", str(error))
        return
    for name in ("prefect", "mlflow", "worker"):
        service = running.get(name)
        if service is None:
            continue
        if services.is_healthy(service):
            yield Finding("servers", "good", f"{name} answers{f' at {service.url}' if service.url else ''}")
        else:
            cure = f"read {service.log}, then radlads services down && radlads services up"
            yield Finding("servers", "fault", f"{name} (pid {service.pid}) does not answer", cure)
    if not running:
        yield Finding("servers", "note", "Prefect and MLflow are not started: `radlads services up`; runs do without")
    if tracking.startswith("http") and tracking != str(getattr(running.get("mlflow"), "url", "")):
        if services.answers(f"{tracking}/health"):
            yield Finding("servers", "good", f"MLflow answers at {tracking}")
        else:
            cure = "start it, correct RADLADS_TRACKING or --tracking, or set it to none"
            yield Finding("servers", "warning", f"MLflow at {tracking} does not answer", cure)


def _print(finding: Finding) -> None:
    from rich.markup import escape
    from rich.table import Table

    mark = f"[{_STYLES[finding.level]}]{finding.level}[/]"
    if not OUT.is_terminal:  # a line each, for whatever reads it
        cure = f" ({finding.cure})" if finding.cure else ""
        OUT.print(f"{mark} {finding.what}: {escape(finding.text + cure)}", highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(width=7)
    table.add_column(width=8, style="bold")
    table.add_column(overflow="fold")
    table.add_row(mark, finding.what, escape(finding.text))
    if finding.cure:
        table.add_row("", "", f"[dim]{escape(finding.cure)}[/]")
    OUT.print(table, highlight=False)
