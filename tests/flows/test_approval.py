"""A run that waits for a person before what is expensive: in Prefect's page, at the terminal, or not at all."""

import io
import os
import pty
import sys
import threading
import time
from contextvars import copy_context

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled
from rich.console import Console

from radlads.flows import approval
from radlads.flows.convert import radlads
from radlads.tasks.announce import Outlook
from radlads.tasks.contracts.errors import UserError

pytestmark = pytest.mark.usefixtures("prefect_server")
COSTS = {"align": 8.0, "distill": 2.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(approval, "_LOOK_SECONDS", 0.1)


class Background:
    """A flow in a thread, as a command in the foreground."""

    def __init__(self, client, name, **parameters):
        self.client, self.name, self.state = client, name, None
        asked = {"run": name, "return_state": True, **parameters}
        self._thread = threading.Thread(target=copy_context().run, args=[self._run, asked])
        self._thread.start()

    def _run(self, asked):
        self.state = radlads(**asked)

    def flow_run(self):
        wanted = FlowRunFilter(name=FlowRunFilterName(like_=f"{self.name}:"))
        return next(iter(self.client.read_flow_runs(flow_run_filter=wanted)), None)

    def paused(self):
        end = time.monotonic() + 120
        while (run := self.flow_run()) is None or not run.state.is_paused():
            assert time.monotonic() < end, "it did not pause"
            assert self._thread.is_alive(), self.state
            time.sleep(0.2)
        return run

    def end(self):
        self._thread.join(120)
        return self.state


def test_a_run_pauses_before_what_costs_too_much_and_goes_on(recipe, places, jobs):
    jobs.dollars |= COSTS
    with get_client(sync_client=True) as client:
        background = Background(client, "a1", recipe=recipe, approve_over=5.0, **places)
        run = background.paused()
        assert jobs.order == ["plan", "tokenize", "transplant"]
        assert run.state.message == (
            "align is estimated at 4.0 GPU hours, 8.00 dollars, more than the 5.00 dollars that need no approval"
        )
        resume_flow_run(run.id)
        assert background.end().is_completed()
    assert jobs.launched["align"] == jobs.launched["distill"] == 1
    again = radlads(recipe, run="a1", approve_over=5.0, **places, return_state=True)
    assert again.is_completed(), "what is there costs nothing"


def test_a_paused_run_can_be_cancelled(recipe, places, jobs):
    jobs.dollars |= COSTS
    with get_client(sync_client=True) as client:
        background = Background(client, "a2", recipe=recipe, approve_over=5.0, **places)
        client.set_flow_run_state(background.paused().id, Cancelled(), force=True)
        state = background.end()
    assert state.is_cancelled()
    assert state.message == "align was not approved: the run was cancelled"
    assert "align" not in jobs.launched


def test_a_run_of_a_deployment_holds_nothing_while_it_waits(recipe, places, jobs):
    jobs.dollars |= COSTS
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(flow_id=client.create_flow_from_name(radlads.name), name="approval")
        try:
            asked = {"recipe": recipe, "run": "a3", "approve_over": 5.0, **places}
            run = client.create_flow_run_from_deployment(deployment, parameters=asked)
            with pytest.raises(Pause):
                run_flow(radlads, flow_run=run, parameters=run.parameters, return_type="state")
            suspended = client.read_flow_run(run.id)
            assert suspended.state.name == "Suspended"
            assert "align" not in jobs.launched
            resume_flow_run(run.id)
            run = client.read_flow_run(run.id)
            assert run.state.is_scheduled()
            assert run_flow(radlads, flow_run=run, parameters=run.parameters, return_type="state").is_completed()
        finally:
            client.delete_deployment(deployment)
    assert jobs.launched["plan"] == jobs.launched["align"] == 1


def test_without_prices_nothing_can_be_asked(recipe, places, jobs):
    state = radlads(recipe, run="a4", approve_over=5.0, **places, return_state=True)
    assert state.is_failed()
    assert "set resources.dollars_per_gpu_hour" in state.message
    assert dict(jobs.launched) == {"plan": 1}


@pytest.mark.parametrize(
    ("answer", "told"),
    [(None, "there is nobody to ask"), (lambda _: False, "was not approved"), (lambda _: True, None)],
)
def test_without_a_page_the_terminal_is_asked(monkeypatch, answer, told):
    monkeypatch.setattr(approval.Terminal, "ask", staticmethod(answer) if answer else None)
    approve = approval.approval_over(5.0)(
        [Outlook("align", "new", dollars=8.0), Outlook("distill", "new", dollars=5.0)]
    )
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        approve("distill")
        approve("publish")
        if told is None:
            approve("align")
            return
        with pytest.raises(UserError, match=told) as caught:
            approve("align")
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_is_asked_unless_it_is_wanted():
    assert approval.approval_over(None) is None


def test_what_was_typed_before_the_question_is_no_answer(monkeypatch):
    user, terminal = pty.openpty()
    screen = io.StringIO()
    with os.fdopen(terminal, "r") as stdin, temporary_settings({PREFECT_API_URL: None}):
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(user, b"y\n")
        with approval.asked_at_terminal(Console(file=screen, force_terminal=True, width=80)):
            answers = []
            asking = threading.Thread(target=lambda: answers.append(approval.Terminal.ask("Run it?")))
            asking.start()
            end = time.monotonic() + 30
            while "[y/N]" not in screen.getvalue() and time.monotonic() < end:
                time.sleep(0.02)
            os.write(user, b"n\n")
            asking.join(30)
    os.close(user)
    assert answers == [False]
