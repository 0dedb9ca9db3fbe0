"""Somebody is told of a run that failed, by a real server, with the address nowhere in sight."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.blocks.notifications import SlackWebhook
from prefect.client.orchestration import get_client

from radlads.deployments.notices import MESSAGE, WEBHOOK, make_notices
from radlads.flows.convert import radlads
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.settings import Notices, resolve_notices

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def receiver():
    """(address, what it was sent)"""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent.append((self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook/of-this-team", sent
    server.shutdown()


@pytest.fixture
def client():
    with get_client(sync_client=True) as client:
        yield client
        for name in (WEBHOOK, MESSAGE):
            for old in client.read_automations_by_name(name):
                client.delete_automation(old.id)


def test_a_failed_run_is_told_once(client, receiver, recipe, places, jobs):
    url, sent = receiver
    assert make_notices(client, Notices(url="http://127.0.0.1:9/former")) == [f"automation {WEBHOOK}"]
    assert make_notices(client, Notices(url=url)) == [f"address of {WEBHOOK}"]
    assert make_notices(client, Notices(url=url)) == []
    for automation in client.read_automations_by_name(WEBHOOK):
        assert "of-this-team" not in automation.model_dump_json()
    jobs.failures["align"] = ["config"]
    assert radlads(recipe, run="told-n1", **places, return_state=True).is_failed()
    end = time.monotonic() + 60
    while not sent:
        assert time.monotonic() < end, "nobody was told"
        time.sleep(0.2)
    kind, body = sent[0]
    text = json.loads(body)["text"]
    assert kind == "application/json"
    assert text.startswith("radlads: told-n1: demo to rad_rwkv7 (hybrid) is Failed: align: no luck with align")
    assert "None" not in text, "this server has no page"
    time.sleep(1)
    assert len(sent) == 1


def test_a_block_of_the_user_is_used(client):
    with pytest.raises(UserError, match="Prefect has no block slack-webhook/nobody; make it in its page"):
        make_notices(client, Notices(block=("slack-webhook", "nobody")))
    SlackWebhook(url="http://127.0.0.1:9/x").save("team", overwrite=True)
    notices = Notices(block=("slack-webhook", "team"))
    assert make_notices(client, notices) == [f"automation {MESSAGE}"]
    assert make_notices(client, notices) == []


def test_the_variables():
    url = "https://hooks.example/services/T0/secret-part"
    found = resolve_notices({"RADLADS_NOTIFY_URL": url, "RADLADS_NOTIFY_BLOCK": "sendgrid-email/me"})
    assert (found.url, found.block) == (url, ("sendgrid-email", "me"))
    assert "secret-part" not in repr(found)
    assert "secret-part" not in hide(f"no answer from {url}")
    assert resolve_notices({}) == Notices()
    for name, value in (("RADLADS_NOTIFY_URL", "hooks.example/secret-part"), ("RADLADS_NOTIFY_BLOCK", "slack")):
        with pytest.raises(UserError, match=name) as caught:
            resolve_notices({name: value})
        assert "secret-part" not in str(caught.value)
