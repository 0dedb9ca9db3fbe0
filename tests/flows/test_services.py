"""Nobody but the user talks to the servers: neither a page of another site, nor another user, nor a flow run's command.

Both servers and the worker are real, started once, as a person starts them.
"""

import asyncio
import base64
import json
import os
from pathlib import Path

import httpx
import psutil
import pytest

from radlads.flows import service_password, services
from radlads.flows.door import Door
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing import credentials

ROOT = Path(__file__).resolve().parent.parent.parent
FOREIGN = [{"Origin": "http://elsewhere.example"}, {"Origin": "null"}, {"Host": "elsewhere.example:{port}"}]
QUESTIONS = {
    "prefect": ("/api/flow_runs/filter", {}),
    "mlflow": ("/api/2.0/mlflow/experiments/search", {"max_results": 5}),
}


def ask(url, path, body, **more):
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(url + path, json=body, **more).status_code


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_server_answers_its_user_only(running, name):
    url, user, (path, body) = running.urls[name], running.user, QUESTIONS[name]
    port = url.rpartition(":")[2]
    assert ask(url, path, body) == 401
    assert ask(url, path, body, auth=("radlads", "guess")) == 401
    assert ask(url, path, body, auth=user) == 200
    assert ask(url, path, body, auth=user, headers={"Origin": f"http://localhost:{port}"}) == 200
    for headers in FOREIGN:
        headers = {key: value.format(port=port) for key, value in headers.items()}
        assert ask(url, path, body, headers=headers) == 403
        assert ask(url, path, body, auth=user, headers=headers) == 403, "a browser may add the password by itself"


def test_the_answer_allows_no_other_origin(running):
    for url in (running.urls["prefect"], running.urls["mlflow"]):
        asked = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
        answer = httpx.options(f"{url}/api/flows/filter", headers=asked, auth=running.user, trust_env=False)
        assert "access-control-allow-origin" not in answer.headers


def test_a_flow_run_brings_no_command(running, deployed):
    """A run that brings a command of its own is refused, and leaves no trace."""
    assert deployed.endswith(running.urls["prefect"] + "/api")
    with running.api() as api:
        before = api.post("/flow_runs/count", json={}).raise_for_status().json()
        deployment = api.get("/deployments/name/radlads/full").raise_for_status().json()
        assert deployment["job_variables"] == {"working_dir": str(ROOT)}
        run = f"/deployments/{deployment['id']}/create_flow_run"
        for variables in ({"command": "touch /tmp/x"}, {"env": {"PYTHONPATH": "/tmp"}}, {"working_dir": "x"}):
            asked = {"parameters": {"recipe": "smoke"}, "job_variables": variables, "state": {"type": "PENDING"}}
            answer = api.post(run, json=asked)
            assert answer.status_code == 422, variables
        parameters = {"recipe": "smoke", "tracking": "http://somebody:opensesame@mlflow:5000"}
        answer = api.post(run, json={"parameters": parameters, "state": {"type": "PENDING"}})
        assert answer.status_code == 409, "the password of an address would be kept in Prefect's database"
        assert api.post("/flow_runs/count", json={}).json() == before
        pool = api.get("/work_pools/radlads").json()["base_job_template"]
        assert "command" not in json.dumps(pool)


def test_the_password_is_nowhere_to_be_read(running):
    home, (_, password) = running.home, running.user
    assert str(home / "services-password") in running.said
    assert password not in running.said
    for service in json.loads((home / "services.json").read_text()).values():
        process = psutil.Process(service["pid"])
        lines = [" ".join(p.cmdline()) for p in [process, *process.children(recursive=True)]]
        assert not any(password in line for line in lines)
    for path in home.rglob("*"):
        if path.is_file() and path.name != "services-password":
            assert password.encode() not in path.read_bytes(), path
    for name in ("services-password", "services.json", "prefect", "logs", "mlflow-artifacts", "mlflow.db"):
        assert (home / name).stat().st_mode & 0o077 == 0, name
    listening = [c for service in json.loads((home / "services.json").read_text()).values()
                 for c in psutil.Process(service["pid"]).net_connections("inet") if c.status == "LISTEN"]  # fmt: skip
    # The third is the worker's line to its flow runs, which asks for a token.
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
    assert len(listening) <= 3


# The door alone


def knock(door, kind="http", path="/", headers=()):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers]}
    asyncio.run(door(scope, receive, send))
    return sent[0]


async def inside(scope, receive, send):
    await send({"type": "inside"})


def basic(text):
    return ("authorization", f"Basic {base64.b64encode(text.encode()).decode()}")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 403),
        ([("host", "127.0.0.1:9")], 401),
        ([("host", "localhost")], 401),
        ([("host", "[::1]:77")], 401),
        ([("host", "127.0.0.1:9"), ("host", "elsewhere")], 403),
        ([("host", "127.0.0.1.elsewhere.example:9")], 403),
        ([("host", "elsewhere.example:9@127.0.0.1")], 403),
        ([("host", "127.0.0.1:9"), basic("a:b")], None),
        ([("host", "LOCALHOST:4000"), ("origin", "http://localhost:4000"), basic("a:b")], None),
        ([("host", "127.0.0.1:9"), ("origin", "http://localhost:9"), basic("a:b")], None),
        ([("host", "127.0.0.1:9"), ("origin", "http://localhost:8888"), basic("a:b")], 403),
        ([("host", "127.0.0.1:9"), ("origin", "https://127.0.0.1:9"), basic("a:b")], 403),
        ([("host", "127.0.0.1:9"), basic("a:c")], 401),
        ([("host", "127.0.0.1:9"), basic("")], 401),
        ([("host", "127.0.0.1:9"), basic("a:b"), basic("a:b")], 401),
        ([("host", "127.0.0.1:9"), ("authorization", "Basic é")], 401),
        ([("host", "127.0.0.1:9"), ("authorization", "Bearer a:b")], 401),
    ],
)
def test_who_comes_in(headers, status):
    door = Door(inside, port=9, password="a:b", open_paths={"/health"})
    answer = knock(door, headers=headers)
    assert answer.get("status") == status
    assert answer["type"] == ("inside" if status is None else "http.response.start")
    closed = knock(door, kind="websocket", headers=headers)
    assert closed["type"] == ("inside" if status is None else "websocket.close")


def test_names_of_a_network_are_added_to_those_of_loopback():
    door = Door(inside, port=9, password="a:b", names=["mlflow"])
    for host in ("mlflow:5000", "MLflow", "127.0.0.1:9"):
        assert knock(door, headers=[("host", host), basic("a:b")])["type"] == "inside"
    assert knock(door, headers=[("host", "mlflow:5000")])["status"] == 401
    assert knock(door, headers=[("host", "mlflow.elsewhere.example"), basic("a:b")])["status"] == 403
    page = [("host", "mlflow:5000"), ("origin", "http://elsewhere.example"), basic("a:b")]
    assert knock(door, headers=page)["status"] == 403


def test_what_needs_no_password():
    door = Door(inside, port=9, password="a:b", open_paths={"/health"})
    assert knock(door, path="/health", headers=[("host", "127.0.0.1:9")])["type"] == "inside"
    assert knock(door, path="/health/x", headers=[("host", "127.0.0.1:9")])["status"] == 401
    assert knock(door, path="/health")["status"] == 403
    assert knock(door, kind="lifespan")["type"] == "inside"


# The password's file


def test_the_password_is_made_once_and_for_one(tmp_path):
    made = service_password.make_password(tmp_path)
    assert service_password.make_password(tmp_path) == made
    assert service_password.password_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert len(made) >= 32


@pytest.mark.parametrize("spoil", [lambda p: p.chmod(0o644), lambda p: p.write_text("radlads:short"),
                                   lambda p: p.write_bytes(b"\xff\xfe")])  # fmt: skip
def test_a_password_that_others_may_know_is_not_used(tmp_path, spoil):
    service_password.make_password(tmp_path)
    spoil(service_password.password_file(tmp_path))
    with pytest.raises(UserError, match="services-password") as caught:
        service_password.make_password(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_password_goes_to_no_other_server(tmp_path, monkeypatch):
    password = service_password.make_password(tmp_path)
    for name in ("PREFECT_API_AUTH_STRING", "RADLADS_TRACKING", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    own = psutil.Process()
    services._write(tmp_path, {
        "prefect": services.Service("prefect", own.pid, own.create_time(), "http://127.0.0.1:4299", "log", True)
    })  # fmt: skip
    monkeypatch.setenv("PREFECT_API_URL", "http://orchestrator.example/api")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    services.use_services(tmp_path)
    assert "PREFECT_API_AUTH_STRING" not in os.environ
    assert os.environ["PREFECT_API_URL"] == "http://orchestrator.example/api"
    del os.environ["PREFECT_API_URL"]
    services.use_services(tmp_path)
    assert os.environ["PREFECT_API_AUTH_STRING"] == password
    assert credentials.hide(f"x {password} y") == "x *** y"


NEGATIVE = '{"prefect": {"name": "prefect", "pid": -1, "started": 0, "url": null, "log": "x"}}'


@pytest.mark.parametrize("text", ["[1]", "{", '{"prefect": 1}', '{"prefect": {"pid": "x"}}', "[" * 50000, NEGATIVE])
def test_a_state_file_of_another_kind(tmp_path, text):
    (tmp_path / "services.json").write_text(text)
    with pytest.raises(UserError, match="delete it") as caught:
        services.read_services(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_server_of_a_run_alone_asks_for_a_password_too():
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_SERVER_API_AUTH_STRING,
        temporary_settings,
    )

    from radlads.flows.common import orchestrator

    with temporary_settings(restore_defaults={PREFECT_API_URL, PREFECT_API_AUTH_STRING}), orchestrator():
        assert len(PREFECT_SERVER_API_AUTH_STRING.value()) > 32
        assert PREFECT_API_AUTH_STRING.value() == PREFECT_SERVER_API_AUTH_STRING.value()
    own = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_API_AUTH_STRING: "a:b"}
    with temporary_settings(own), orchestrator():
        assert PREFECT_API_AUTH_STRING.value() == "a:b"
    told = pytest.raises(UserError, match=r"Prefect at http://127.0.0.1:9/api: .* failed; start the services")
    with temporary_settings(own), told, orchestrator():
        raise httpx.ConnectError("All connection attempts failed")
