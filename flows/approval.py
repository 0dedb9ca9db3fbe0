"""The pause before an expensive stage, if a run was asked for one: Resume in Prefect's page goes on.

A run of a deployment is suspended: its process ends, so it holds no machine while it waits, and a worker starts it
again, when it finds its finished stages in the store. A run in the foreground waits in its process; without a server's
page the question is asked at the terminal.
"""

from __future__ import annotations

import logging
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Paused
from rich.console import Console

from radlads.flows.live_view import LiveTable
from radlads.tasks.announce import Outlook
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.launchers.stopping import REQUEST, RunStopped

_log = logging.getLogger("prefect.radlads")
_LONGEST_SECONDS = 7 * 24 * 3600
_LOOK_SECONDS = 2.0
_STOP_LOOK_SECONDS = 0.2


class Terminal:
    """How a run in the foreground asks the user. None: there is nobody to ask."""

    ask: Callable[[str], bool] | None = None


def approval_over(dollars: float | None) -> Callable[[list[Outlook]], Callable[[str], None]] | None:
    """What run_announced asks for before each stage; None if nothing needs approval. dollars: the most that a stage may
    cost without."""
    if dollars is None:
        return None

    def begin(found: list[Outlook]) -> Callable[[str], None]:
        ahead = {one.label: one for one in found if one.made is None}
        if ahead and all(one.dollars is None for one in ahead.values()):
            raise UserError(
                "approve_over needs the estimated cost of stages, and the plan has none: set "
                "resources.dollars_per_gpu_hour, on a machine or for machines with GPUs"
            )

        def approve(label: str) -> None:
            one = ahead.get(label)
            if one is not None and one.dollars is not None and one.dollars > dollars:
                _wait_for_approval(one, dollars)

        return approve

    return begin


@contextmanager
def asked_at_terminal(err: Console) -> Iterator[None]:
    """Meanwhile a run without a server's page asks here, if somebody is at the terminal."""

    def ask(question: str) -> bool:
        with LiveTable.hidden():
            _forget_typed()
            err.print(f"{question} \\[y/N]", end=" ", markup=True, highlight=False, soft_wrap=True)
            while not select.select([sys.stdin], [], [], _STOP_LOOK_SECONDS)[0]:
                REQUEST.check()
            return sys.stdin.readline().strip().lower() in ("y", "yes")

    Terminal.ask = ask if sys.stdin.isatty() and err.is_terminal else None
    try:
        yield
    finally:
        Terminal.ask = None


def _forget_typed() -> None:
    """What was typed hours ago answers no question."""
    with suppress(termios.error, OSError, ValueError):
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


def _wait_for_approval(stage: Outlook, dollars: float) -> None:
    """Return once the user has approved. Raises UserError where they do not or cannot, RunStopped."""
    what = f"{stage.label} is estimated at {stage.cost}, more than the {dollars:,.2f} dollars that need no approval"
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None:
        try:
            suspend_flow_run(timeout=_LONGEST_SECONDS, key=f"approve-{stage.product}")
        except Pause:
            _log.warning("%s: suspended; Resume in Prefect's page goes on, Cancel ends the run", what)
            raise
    elif PREFECT_API_URL.value():
        _log.warning("%s: paused; Resume in Prefect's page goes on: %s", what, flow_run.ui_url)
        _pause(stage, what)
    elif Terminal.ask is None:
        raise UserError(f"{what}, and there is nobody to ask: give a higher --approve-over, or leave it out")
    elif not Terminal.ask(f"{what}. Run it?"):
        raise UserError(f"{what}, and was not approved; what was made before is kept")
    _log.info("%s was approved", stage.label)


def _pause(stage: Outlook, what: str) -> None:
    """Pause the run in this process until it is resumed."""
    with get_client(sync_client=True) as client:
        paused: State[Any] = Paused(
            message=what, timeout_seconds=_LONGEST_SECONDS, reschedule=False, pause_key=f"approve-{stage.product}"
        )
        client.set_flow_run_state(flow_run.id, paused)
        end = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < end:
            state = client.read_flow_run(flow_run.id).state
            if state is not None and state.is_running():
                return
            if state is not None and not state.is_paused():
                raise RunStopped(f"{stage.label} was not approved: the run was {(state.name or 'ended').lower()}")
            look = time.monotonic() + _LOOK_SECONDS
            while time.monotonic() < look:
                REQUEST.check()
                time.sleep(_STOP_LOOK_SECONDS)
    raise UserError(f"{what}, and nobody approved it within a week")
