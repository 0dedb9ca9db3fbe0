"""A password in an address reaches those who need it, and is written nowhere: not by us, not by what others raise."""

import base64
import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import boto3
import pytest
from botocore.config import Config

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import StoreRef, TrackingRef
from radlads.tasks.contracts.parsing import credentials
from radlads.tasks.contracts.parsing.credentials import (
    find_secret,
    has_credentials,
    hide,
    take_credentials,
    with_credentials,
)
from radlads.tasks.contracts.recipe.recipe import RecipeError, parse_recipe
from radlads.tasks.contracts.settings import refuse_credentials, resolve_settings
from radlads.tasks.contracts.specs import PlanSpec
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.contracts.store.s3.client import make_client
from radlads.tasks.contracts.tracking import RunIdentity, open_pipeline_run
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.stage import run_stage

WORD = "Open%2FSesame-93"
PLAIN = "Open/Sesame-93"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(credentials, "_kept", {})
    monkeypatch.setattr(credentials, "_secrets", set())


@pytest.mark.parametrize(
    ("address", "clean"),
    [
        (f"http://ann:{WORD}@mlflow:5000/base", "http://mlflow:5000/base"),
        (f"https://{WORD}@mlflow", "https://mlflow"),
        (f"postgresql+psycopg2://ann:{WORD}@db/runs", "postgresql+psycopg2://db/runs"),
        (f"http://ann:{WORD}@[::1]:5000", "http://[::1]:5000"),
        (f"http://a@b:{WORD}@mlflow", "http://mlflow"),
    ],
)
def test_an_address_without_them_is_what_is_left(address, clean):
    assert has_credentials(address)
    assert take_credentials(address) == clean
    assert not has_credentials(clean)
    assert with_credentials(clean) == address
    told = f"GET {address}/api failed; {PLAIN}; {WORD}"
    assert WORD not in hide(told)
    assert PLAIN not in hide(told)
    handed_on = credentials.child_environment()
    credentials._kept.clear()
    assert with_credentials(clean) == clean
    credentials.learn(handed_on)
    assert with_credentials(clean) == address


@pytest.mark.parametrize("address", ["http://mlflow:5000", "sqlite:////tmp/a@b.db", "s3://bucket/a@b", "/tmp/a@b:c"])
def test_an_address_without_any_stays_as_it_is(address):
    assert take_credentials(address) == address
    assert with_credentials(address) == address
    assert hide(f"at {address}.") == f"at {address}." or "://" in address


def test_they_go_to_no_other_server():
    take_credentials(f"http://ann:{WORD}@mlflow:5000")
    for other in ("http://mlflow:5001", "https://mlflow:5000", "http://mlflow", "http://mlflow:5000.example"):
        assert with_credentials(other) == other


@pytest.mark.parametrize(
    "told",
    [
        "https://bucket.s3.amazonaws.com/k?X-Amz-Credential=AKIAABCDEFGHIJKLMNOP%2F&X-Amz-Signature=0123456789abcdef&x=1",
        "token hf_abcdefghijklmnopqrstuvwxyz0123 is not valid",
        "postgresql://ann:0123456789abcdef@db failed",
        "http://x?password=0123456789abcdef",
    ],
)
def test_what_looks_like_one_is_hidden(told):
    shown = hide(told)
    for secret in ("AKIAABCDEFGHIJKLMNOP", "0123456789abcdef", "hf_abcdef"):
        assert secret not in shown
    assert "***" in shown


def test_those_of_the_environment_are_hidden():
    credentials.learn({"AWS_SECRET_ACCESS_KEY": "abc/def+ghi", "HF_TOKEN": "", "HOME": "/root"})
    assert hide("key abc/def+ghi in /root") == "key *** in /root"


def test_a_formatter_hides_them_in_tracebacks_too():
    take_credentials(f"http://ann:{WORD}@mlflow")
    try:
        raise OSError(f"http://ann:{WORD}@mlflow is down")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "no %s", (PLAIN,), sys.exc_info())
    text = credentials.HidingFormatter("%(message)s").format(record)
    assert "is down" in text
    assert WORD not in text
    assert PLAIN not in text


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("teacher.path", f"https://ann:{WORD}@models.example/x", "a password in an address"),
        ("description", "https://b.s3.amazonaws.com/k?X-Amz-Signature=abcdef", "a signed address"),
        ("student.options", {"note": "hf_abcdefghijklmnopqrstuvwxyz"}, "an access key or token"),
        ("student.options", {"AKIAABCDEFGHIJKLMNOP": 1}, "an access key or token"),
        ("sources", ["wJalrXUtnFEMI/K7MDENG"], "a password or key of the environment"),
    ],
)
def test_a_recipe_with_one_is_refused(place, value, what):
    credentials.learn({"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG"})
    raw = {"name": "x", "teacher": {"path": "demo"}, "data": {"t": {"sources": [{"kind": "files", "paths": ["a"]}]}}}
    *parents, last = place.split(".")
    node = raw
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    with pytest.raises(RecipeError, match=what) as caught:
        parse_recipe(raw)
    assert place in str(caught.value)
    for secret in (WORD, "abcdef", "hf_", "AKIA", "wJalr"):
        assert secret not in str(caught.value)


def test_a_recipe_without_one_passes():
    credentials.learn({"MLFLOW_TRACKING_PASSWORD": "student"})
    assert find_secret({"student": {"path": "a student's folder"}}) is None
    assert find_secret({"a": ["hub/id", "https://huggingface.co/x", "s3://b/k", "me@example.com", "x: y@z"]}) is None


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RADLADS_STORE": f"s3://ann:{WORD}@bucket/p"}, "AWS_ACCESS_KEY_ID"),
        ({"RADLADS_TRACKING": f"http://ann:{WORD}@"}, "not a valid address"),
        ({"RADLADS_TRACKING": f"http://ann:{WORD}@host:x"}, "not a valid address"),
        ({"RADLADS_TRACKING": f"ftp://ann:{WORD}@host"}, "not an MLflow server"),
        ({"RADLADS_TRACKING": f"postgresql://db/x?user=ann&password={WORD}"}, "write a database as"),
        (
            {"RADLADS_STORE": "s3://bucket", "RADLADS_S3_ENDPOINT": f"http://ann:{WORD}@host:99999"},
            "not a valid address",
        ),
    ],
)
def test_a_mistake_beside_one_does_not_show_it(environment, told):
    with pytest.raises(UserError, match=told) as caught:
        resolve_settings(environment=environment)
    assert WORD not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_runs_parameters_hold_none():
    refuse_credentials(store="s3://bucket", tracking="http://mlflow", other=None)
    with pytest.raises(UserError, match="RADLADS_TRACKING") as caught:
        refuse_credentials(tracking=f"http://ann:{WORD}@mlflow")
    assert WORD not in str(caught.value)


def test_keys_of_an_endpoints_address_sign_its_requests(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    environment = {"RADLADS_STORE": "s3://bucket/p", "RADLADS_S3_ENDPOINT": f"http://ann:{WORD}@s3.example:9000"}
    found = resolve_settings(environment=environment)
    assert found.store == StoreRef(uri="s3://bucket/p", endpoint_url="http://s3.example:9000")
    signer = make_client(found.store)._request_signer._credentials
    assert (signer.access_key, signer.secret_key) == ("ann", PLAIN)


class Mlflow(BaseHTTPRequestHandler):
    """Answers nothing well, and notes who asks."""

    asked: list[str | None] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.headers["Authorization"])
        self.send_response(400)
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def mlflow_server():
    Mlflow.asked.clear()
    server = HTTPServer(("127.0.0.1", 0), Mlflow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def everything(client, bucket):
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", ())]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def test_a_launched_job_writes_none(moto_endpoint, mlflow_server, tmp_path, monkeypatch, capfd, caplog):
    """Work folder, store, console and log of a job that uses both addresses."""
    client = boto3.session.Session().client(
        "s3", endpoint_url=moto_endpoint, region_name="us-east-1", config=Config(proxies={})
    )
    client.create_bucket(Bucket="doors")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RADLADS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RADLADS_STORE", "s3://doors/p")
    monkeypatch.setenv("RADLADS_S3_ENDPOINT", moto_endpoint.replace("://", f"://ann:{WORD}@"))
    monkeypatch.setenv("RADLADS_TRACKING", f"http://ann:{WORD}@{mlflow_server}")
    with open_pipeline("smoke", run="r", run_id="0" * 8) as pipeline:
        assert pipeline.settings.tracking == f"http://{mlflow_server}"
        asked = PlanSpec(recipe=pipeline.recipe, sizes_only=True)
        ref = TrackingRef(uri=pipeline.settings.tracking, experiment="e", run_id="f" * 32)
        request = pipeline.request("plan", asked, {})
        product = run_stage(request, open_tracking=lambda digest: ref)
    scratch = request.scratch
    assert scratch == tmp_path / "home" / "work" / "products" / "plan" / request.digest
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert (scratch / "job.json").stat().st_mode & 0o777 == 0o600
    job = json.loads((scratch / "job.json").read_text())
    assert job["store"]["endpoint_url"] == moto_endpoint
    assert job["tracking"]["uri"] == f"http://{mlflow_server}"
    basic = base64.b64encode(f"ann:{PLAIN}".encode()).decode()
    assert set(Mlflow.asked) == {f"Basic {basic}"}, "the server was asked with the password"
    stored = everything(client, "doors")
    assert {key.rpartition("/")[2] for key in stored} >= {"plan.json", "manifest.json", "recipe.yaml", "job.json"}
    out, err = capfd.readouterr()
    texts = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} | stored
    texts |= {"out": out.encode(), "err": err.encode(), "log": caplog.text.encode()}
    for name, data in texts.items():
        for secret in (WORD, PLAIN, basic):
            assert secret.encode() not in data, name
    assert product.manifest.stage == "plan"
    assert WORD not in repr(open_store(pipeline.settings.store).ref) + repr(pipeline.settings)
    assert open_pipeline_run(pipeline.settings.tracking, "e", RunIdentity(store="s", run="r")) is None
    assert WORD not in caplog.text
