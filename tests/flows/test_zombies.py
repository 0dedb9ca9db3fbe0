"""A run whose process is killed is marked; one whose step takes long is not. Real processes, a real server."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from radlads.deployments.zombies import AUTOMATION, ask_after_runs, make_automation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
SILENCE = timedelta(seconds=10)  # the shortest that Prefect allows
# A flow of ours as far as Prefect sees: the name, and a step that says nothing for a long time.
PROGRAM = """
    import sys, time
    import prefect.flow_engine
    prefect.flow_engine.MINIMUM_HEARTBEAT_INTERVAL = 1  # a second instead of half a minute, the least it takes
    prefect.flow_engine.BaseFlowRunEngine.heartbeat_seconds = property(lambda self: 1)
    from prefect import flow
    from prefect.runtime import flow_run
    @flow(name="radlads-quiet")
    def quiet(seconds: float):
        print(flow_run.id, flush=True)
        time.sleep(seconds)
    quiet(float(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path):
    started = []
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))

    def one(seconds):
        env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
        command = [sys.executable, str(tmp_path / "program.py"), str(seconds)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield one
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def client():
    with get_client(sync_client=True) as client:
        for old in client.read_automations_by_name(AUTOMATION):
            client.delete_automation(old.id)
        yield client
        for old in client.read_automations_by_name(AUTOMATION):
            client.delete_automation(old.id)


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.3)


def test_a_killed_run_is_marked_and_a_quiet_one_is_not(client, start):
    assert make_automation(client, SILENCE) == [f"automation {AUTOMATION}"]
    killed, quiet = start(1000), start(14)
    dead, alive = killed.stdout.readline().strip(), quiet.stdout.readline().strip()
    began = time.monotonic()

    def state(run):
        return client.read_flow_run(run).state

    wait_for(lambda: {dead, alive} <= {str(run.id) for run in client.read_flow_runs()}, 10)
    time.sleep(2)  # a heartbeat or two
    killed.send_signal(signal.SIGKILL)
    wait_for(lambda: state(dead).type == "CRASHED", 40)
    assert "no heartbeat for 10 s" in state(dead).message
    assert state(alive).type in ("RUNNING", "COMPLETED")
    quiet.wait(timeout=60)
    assert time.monotonic() - began > SILENCE.total_seconds()
    wait_for(lambda: state(alive).type == "COMPLETED", 10)


def test_a_run_that_died_while_the_server_was_away_is_asked_after(client, start):
    """The server has forgotten the heartbeats of before; so has this one, whose automation is made afterwards."""
    killed = start(1000)
    dead = killed.stdout.readline().strip()
    name = client.read_flow_run(dead).name
    wait_for(lambda: name in ask_after_runs(client), 20)  # a heartbeat has arrived
    killed.send_signal(signal.SIGKILL)
    make_automation(client, SILENCE)
    assert name in ask_after_runs(client)
    wait_for(lambda: client.read_flow_run(dead).state.type == "CRASHED", 40)
    assert name not in ask_after_runs(client)
