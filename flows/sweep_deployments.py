"""The members of a sweep as runs of a deployment: all submitted at once through Prefect's API, then awaited."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterTags
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.stages import PRETRAIN
from radlads.tasks.launchers.stopping import REQUEST, RunStopped

_DEPLOYMENTS = {"radlads": "full", f"radlads-{PRETRAIN.name}": PRETRAIN.name}
"""Flow → its deployment that takes any recipe."""
_LOOK_SECONDS = 1.0
_CANCEL_SECONDS = 10.0
_PAGE = 200


def check_deployment(flow: str) -> UUID:
    """The id of the flow's deployment. Raises UserError if there is no server, or no such deployment on it."""
    if not PREFECT_API_URL.value():
        raise UserError("--deployments needs a Prefect server with a worker: start them with `radlads services up`")
    with get_client(sync_client=True) as client:
        return _deployment_id(client, flow)


def run_deployed(
    flow: str,
    parameters_of: Mapping[str, Mapping[str, Any]],
    begun: Callable[[str], None],
    ended: Callable[[str, State[Any]], bool],
    *,
    sweep: str,
) -> None:
    """Run a deployment once for each name, all at once, and wait for all of them.

    parameters_of: name → parameters. begun: called with a name once its run has started. ended: called with its final
    state; returns whether all others are to be stopped. If a run of that name and sweep is still running, it is awaited
    instead of started again. If the user stops the sweep, all are cancelled. Raises RunStopped, UserError.
    """
    with get_client(sync_client=True) as client:
        deployment = _deployment_id(client, flow)
        tag = f"sweep:{sweep}"
        waiting = _at_work(client, deployment, tag)
        waiting = {name: run for name, run in waiting.items() if name in parameters_of}
        for name, parameters in parameters_of.items():
            if name not in waiting:
                run = client.create_flow_run_from_deployment(
                    deployment, parameters=dict(parameters), name=name, tags=[tag]
                )
                waiting[name] = run.id
        try:
            _wait(client, waiting, begun, ended)
        except RunStopped:
            _cancel(client, waiting)
            raise


def _deployment_id(client: SyncPrefectClient, flow: str) -> UUID:
    name = f"{flow}/{_DEPLOYMENTS[flow]}"
    try:
        return client.read_deployment_by_name(name).id
    except ObjectNotFound:
        raise UserError(
            f"Prefect at {PREFECT_API_URL.value()} has no deployment {name}; in the project's folder: "
            "prefect --no-prompt deploy --all"
        ) from None


def _at_work(client: SyncPrefectClient, deployment: UUID, tag: str) -> dict[str, UUID]:
    """Name of a member → flow run that an earlier call submitted and that has not ended."""
    run_filter = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment]), tags=FlowRunFilterTags(all_=[tag])
    )
    at_work: dict[str, UUID] = {}
    seen = 0
    while page := client.read_flow_runs(flow_run_filter=run_filter, limit=_PAGE, offset=seen):
        seen += len(page)
        # By the parameter: a run's title becomes another one as it begins.
        at_work |= {
            str(run.parameters.get("run") or run.name): run.id
            for run in page
            if run.state is None or not run.state.is_final()
        }
    return at_work


def _wait(
    client: SyncPrefectClient,
    waiting: dict[str, UUID],
    begun: Callable[[str], None],
    ended: Callable[[str, State[Any]], bool],
) -> None:
    """Return when all have ended; those that have are removed from `waiting`."""
    started: set[str] = set()
    while waiting:
        for name, flow_run_id in list(waiting.items()):
            REQUEST.check()
            state = client.read_flow_run(flow_run_id).state
            if state is None or state.is_scheduled() or state.is_pending():
                continue
            if name not in started:
                started.add(name)
                begun(name)
            if state.is_final():
                del waiting[name]
                if ended(name, state):
                    _cancel(client, waiting)
                    return
        end = time.monotonic() + _LOOK_SECONDS
        while waiting and time.monotonic() < end:
            REQUEST.check()
            time.sleep(0.1)


def _cancel(client: SyncPrefectClient, waiting: Mapping[str, UUID]) -> None:
    """Have the worker stop the running runs and drop the pending ones, and wait a limited time for that."""
    try:
        for flow_run_id in waiting.values():
            state = client.read_flow_run(flow_run_id).state
            if state is None or not state.is_final():
                is_ahead = state is None or state.is_scheduled()
                stop = Cancelled if is_ahead else Cancelling
                client.set_flow_run_state(flow_run_id, stop(message="the sweep was stopped"))
        end = time.monotonic() + _CANCEL_SECONDS
        while time.monotonic() < end and not REQUEST.patience_is_over:
            states = [client.read_flow_run(flow_run_id).state for flow_run_id in waiting.values()]
            if all(state is not None and state.is_final() for state in states):
                return
            time.sleep(_LOOK_SECONDS)
    except httpx.HTTPError:
        return
