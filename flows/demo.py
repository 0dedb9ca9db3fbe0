"""`radlads demo`: deploy, start the deployment through the API, show its progress, and report where the results are."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import TaskRunSort
from prefect.states import Cancelling
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import radlads.flows.convert
from radlads.flows.closing import print_verdicts
from radlads.flows.foreground import EXIT_INTERRUPTED
from radlads.flows.service_password import password_file
from radlads.flows.services import Service
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide, with_credentials
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.contracts.settings import Settings
from radlads.tasks.contracts.stages import PUBLISH
from radlads.tasks.contracts.store.open import Store, StoreError, open_store
from radlads.tasks.contracts.store.pointers import read_pointer
from radlads.tasks.stage import scratch_folder

_DEPLOYMENT = "radlads/smoke"
_LOOK_SECONDS = 1.0
_SAY_SECONDS = 30.0
_CANCEL_SECONDS = 15.0


def run_demo(
    out: Console,
    running: Mapping[str, Service],
    settings: Settings,
    recipe: str,
    name: str,
    overrides: Mapping[str, Any],
    again: str,
) -> int:
    """Run the deployment radlads/smoke to its end; the exit code. again: the command that continues this run, which
    Ctrl-C cancels."""
    deploy()
    parameters = {"recipe": recipe, "run": name, "overrides": dict(overrides) or None, "store": settings.store.uri}
    began = time.monotonic()
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(_DEPLOYMENT)
        flow_run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters, name=name)
        page = f"{running['prefect'].url}/runs/flow-run/{flow_run.id}"
        out.print(f"run [bold]{name}[/]: {page}", soft_wrap=True)
        seen = _Seen()
        try:
            state = _watch(out, client, flow_run.id, settings, name, seen)
        except KeyboardInterrupt:
            _cancel(client, flow_run.id)
            out.print(f"{seen.describe()}; to continue: {again}", markup=False, highlight=False, soft_wrap=True)
            return EXIT_INTERRUPTED
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    if not state.is_completed():
        out.print(f"[red]{state.name}[/] after {minutes}:{seconds:02}: ", end="")
        out.print(state.message or "", markup=False, highlight=False, soft_wrap=True)
        out.print(f"Prefect   {page} (Retry continues where it stopped)", soft_wrap=True)
        return 1
    published = read_pointer(open_store(settings.store), name, PUBLISH.name)
    if published is None:
        raise UserError(f"the run '{name}' completed but has no report in {settings.store.uri}")
    product = f"{settings.store.uri}/{published.key}"
    out.print(f"[green]done[/] in {minutes}:{seconds:02}")
    print_verdicts(out, open_store(settings.store), published.key)
    for what, place in (
        ("report", f"{product}/report.html"),
        ("student", f"{product}/model"),
        ("Prefect", page),
        ("MLflow", mlflow_page(str(running["mlflow"].url), load_recipe(recipe).name)),
        ("talk to it", f"radlads chat {name} --both"),
    ):
        out.print(f"{what:10} {place}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"Both pages ask for user and password: {password_file(settings.home)}", soft_wrap=True)
    out.print("The services keep running; `radlads services down` stops them.")
    return 0


def mlflow_page(server: str, experiment: str) -> str:
    """The page of MLflow that compares the experiment's runs; the server's address if the experiment cannot be read."""
    try:
        with httpx.Client(base_url=with_credentials(server), trust_env=False, timeout=10) as client:
            query = {"experiment_name": experiment}
            answer = client.get("/api/2.0/mlflow/experiments/get-by-name", params=query).raise_for_status().json()
    except httpx.HTTPError:
        return server
    return f"{server}/#/experiments/{answer['experiment']['experiment_id']}/runs"


def deploy() -> None:
    """Apply prefect.yaml. Raises UserError."""
    project = Path(radlads.flows.convert.__file__).resolve().parent.parent
    if not (project / "prefect.yaml").is_file():
        raise UserError(f"{project} has no prefect.yaml: the demo runs from a checkout of the project")
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"prefect deploy failed:\n{hide((done.stderr or done.stdout).strip())[-800:]}")


@dataclass
class _Seen:
    """The stages that were running at the last poll, each with its progress."""

    at: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """ "stopped in align at 120/500 steps, loss 1.2" """
        return f"stopped in {' and '.join(self.at)}" if self.at else "stopped between two stages"


def _cancel(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Have the worker stop the run, and wait a limited time for that; another Ctrl-C ends the wait."""
    try:
        client.set_flow_run_state(flow_run_id, Cancelling(message="stopped at the terminal"))
        end = time.monotonic() + _CANCEL_SECONDS
        while time.monotonic() < end:
            state = client.read_flow_run(flow_run_id).state
            if state is not None and state.is_final():
                return
            time.sleep(_LOOK_SECONDS)
    except (KeyboardInterrupt, httpx.HTTPError):
        return


def _watch(
    out: Console, client: SyncPrefectClient, flow_run_id: UUID, settings: Settings, name: str, seen: _Seen
) -> Any:
    """Show the run until it ends; its final state. seen: kept up to date."""
    view, store = _View(out), open_store(settings.store)
    with view.shown():
        while True:
            flow_run = client.read_flow_run(flow_run_id)
            run_filter = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            at = []
            for task_run in client.read_task_runs(flow_run_filter=run_filter, sort=TaskRunSort.EXPECTED_START_TIME_ASC):
                if task_run.state is not None and not task_run.state.is_pending():  # a pending one has no name yet
                    scratch = scratch_of(store, settings.work, name, task_run.name)
                    view.show(task_run.name, task_run.state.name or "", scratch)
                    if task_run.state.is_running():
                        detail = read_progress(scratch)[2]
                        at.append(f"{task_run.name} at {detail}" if detail else task_run.name)
            seen.at = at
            if flow_run.state is not None and flow_run.state.is_final():
                return flow_run.state
            time.sleep(_LOOK_SECONDS)


class _View:
    """One line per stage: a bar on a terminal; elsewhere a line of text for every change, and every half minute."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._bars = Progress(
            TextColumn("{task.description:16}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=out,
        )
        self._rows: dict[str, TaskID] = {}
        self._states: dict[str, str] = {}
        self._said_at: dict[str, float] = {}

    def shown(self) -> Live:
        """Context in which the bars are drawn on the terminal."""
        return Live(Group(self._bars), console=self._out, refresh_per_second=4, transient=not self._out.is_terminal)

    def show(self, stage: str, state: str, scratch: Path) -> None:
        """Update one stage's line."""
        done, total, detail = read_progress(scratch)
        if stage not in self._rows:
            self._rows[stage] = self._bars.add_task(stage, total=1.0, detail="")
        if state == "Completed":
            self._bars.update(self._rows[stage], completed=1.0, detail=detail or "done")
            self._bars.stop_task(self._rows[stage])
        else:
            share = done / total if total else 0.0
            self._bars.update(self._rows[stage], completed=share, detail=detail or state.lower())
        changed, now = self._states.get(stage) != state, time.monotonic()
        late = state == "Running" and now - self._said_at.get(stage, now) >= _SAY_SECONDS
        if not self._out.is_terminal and (changed or late):
            self._out.print(f"{stage}: {state.lower()}{f' ({detail})' if detail else ''}", highlight=False)
        if changed or late:
            self._said_at[stage] = now
        self._states[stage] = state


def scratch_of(store: Store, work: Path, run: str, stage: str) -> Path:
    """The scratch folder of a stage's job, by the run's pointer; the folder of all jobs while there is no pointer."""
    with suppress(StoreError):
        pointer = read_pointer(store, run, stage.replace(" ", "-"))
        if pointer is not None:
            return scratch_folder(work, pointer.stage, pointer.digest)
    return work


def read_progress(scratch: Path) -> tuple[float, float, str]:
    """Done, total, and a text of both with the last loss, from the files that a job writes to its scratch folder."""
    try:
        progress = json.loads((scratch / "progress.json").read_bytes())
        done, total, unit = float(progress["done"]), float(progress["total"]), str(progress["unit"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0, 0.0, ""
    return done, total, f"{done:,.0f}/{total:,.0f} {unit}{_last_loss(scratch / 'metrics.jsonl')}"


def _last_loss(path: Path) -> str:
    try:
        row = json.loads(path.read_bytes()[-4096:].splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return ""
    loss = row.get("loss")
    return f", loss {loss:.4g}" if isinstance(loss, int | float) else ""
