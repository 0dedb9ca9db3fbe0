"""Marks runs whose process died with its host, or by -9; Prefect would show them as RUNNING for ever.

A flow run's process sends heartbeats from a separate thread, so a long step does not interrupt them. An automation of
the server marks a run as Crashed if its heartbeats stop before it ends; Retry resumes it. A server that was down when
the timeout expired misses it: `ask_after_runs`, called whenever the services start, restarts the timeout.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import Event, RelatedResource, Resource, ResourceSpecification

AUTOMATION = "radlads-zombies"
HEARTBEAT = "prefect.flow-run.heartbeat"
SILENCE = timedelta(minutes=8)
"""Eight heartbeats; a busy server may receive a few late. With the server's own delay, within ten minutes."""
_FLOWS = "radlads*"
_ENDS = (
    "Completed",
    "Failed",
    "Crashed",
    "Cancelled",
    "TimedOut",
    "Cancelling",
    "Paused",
    "Suspended",
    "AwaitingRetry",
)
_PAGE = 200


def make_automation(client: SyncPrefectClient, silence: timedelta = SILENCE) -> list[str]:
    """Create the automation unless one with its name exists; returns what was created."""
    if client.read_automations_by_name(AUTOMATION):
        return []
    trigger = EventTrigger(
        after={HEARTBEAT},
        expect={HEARTBEAT, *(f"prefect.flow-run.{name}" for name in _ENDS)},
        match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=ResourceSpecification.model_validate(
            {"prefect.resource.role": "flow", "prefect.resource.name": _FLOWS}
        ),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=silence,
    )
    message = (
        f"no heartbeat for {silence.total_seconds():,.0f} s: its process or its machine died. Retry resumes from "
        "its products and checkpoints"
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)
    client.create_automation(
        AutomationCore(
            name=AUTOMATION,
            description="Marks runs of radlads whose process has died.",
            trigger=trigger,
            actions=[action],
        )
    )
    return [f"automation {AUTOMATION}"]


def ask_after_runs(client: SyncPrefectClient) -> list[str]:
    """Restart the automation's timeout for every run that is shown as running and has sent a heartbeat; returns their
    names. A live run sends its next heartbeat long before the timeout."""
    running = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(like_="radlads")),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState.model_validate({"type": {"any_": [StateType.RUNNING]}})),
        limit=_PAGE,
    )
    asked = [run for run in running if _has_beaten(client, run)]
    events = [_heartbeat(client, run).model_dump(mode="json") for run in asked]
    if events:
        client.request("POST", "/events", json=events).raise_for_status()
    return [run.name for run in asked]


def _has_beaten(client: SyncPrefectClient, run: FlowRun) -> bool:
    wanted = {"event": {"name": [HEARTBEAT]}, "resource": {"id": [f"prefect.flow-run.{run.id}"]}}
    answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1})
    answer.raise_for_status()
    return bool(answer.json()["events"])


def _heartbeat(client: SyncPrefectClient, run: FlowRun) -> Event:
    """An event like those that the run's own process sends."""
    name = client.read_flow(run.flow_id).name
    flow = {"prefect.resource.id": f"prefect.flow.{run.flow_id}", "prefect.resource.role": "flow",
            "prefect.resource.name": name}  # fmt: skip
    resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name}
    return Event(
        event=HEARTBEAT, resource=Resource.model_validate(resource), related=[RelatedResource.model_validate(flow)]
    )
