"""What an S3 store makes of a bad way to its endpoint: a proxy between them alters, cuts, loses, delays and forgets."""

import hashlib
import importlib.util
import logging
import sys
import uuid

import boto3
import pytest
from botocore.config import Config

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store import base as store_base
from radlads.tasks.contracts.store import proof as store_proof
from radlads.tasks.contracts.store.open import CommitConflict, CorruptArtifact, StoreError
from radlads.tasks.contracts.store.s3 import client as s3_client
from radlads.tasks.contracts.store.s3.seal import seal_file
from radlads.tasks.contracts.store.s3.store import S3Store

from .test_store import sheet

PLACE = "runs/a/align"
ADVICE = "delete this prefix"


@pytest.fixture(scope="session")
def proxies(project_root):
    """The module of the proxy, which the drill shares."""
    spec = importlib.util.spec_from_file_location("fault_proxy", project_root / "benchmarks" / "fault_proxy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shared(proxies, moto_endpoint):
    """A proxy and a store behind it; clients take long to make."""
    with proxies.FaultProxy(moto_endpoint) as running:
        made = S3Store(StoreRef(uri=f"s3://art/{uuid.uuid4().hex}", endpoint_url=running.endpoint))
        made.probe()
        yield running, made


@pytest.fixture
def proxy(shared):
    shared[0].rules.clear()
    return shared[0]


@pytest.fixture
def store(shared, proxy, monkeypatch):
    for module in (store_proof, store_base):
        monkeypatch.setattr(module, "PAUSES", (0.0, 0.05, 0.05, 0.05))
    monkeypatch.setattr(s3_client, "_PAUSE_SECONDS", 0.05)
    yield shared[1]
    proxy.rules.clear()
    shared[1].delete(PLACE)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "product"
    made.mkdir()
    (made / "weights.bin").write_bytes(bytes(range(256)) * 50)
    return made


@pytest.fixture
def rule(proxies, proxy):
    def add(method, name, act, **settings):
        made = proxies.Rule(method, f"^/art/[^?]*{name}", act, **settings)  # objects alone, no listings
        proxy.rules.append(made)
        return made

    return add


@pytest.fixture(scope="module")
def direct(moto_endpoint):
    """A client past the proxy."""
    config = Config(s3={"addressing_style": "path"}, proxies={})
    return boto3.session.Session().client("s3", endpoint_url=moto_endpoint, region_name="us-east-1", config=config)


def check_whole(store, folder, into):
    got = store.fetch(PLACE, into)
    assert (got / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()


@pytest.mark.parametrize("times", [1, 2])
def test_a_manifest_altered_on_its_way_is_written_again(store, folder, rule, tmp_path, times):
    altered = rule("PUT", r"manifest\.json", "flip-request", times=times)
    made = store.commit(PLACE, folder, sheet())
    assert altered.hits == times
    assert store.read_manifest(PLACE) == made
    check_whole(store, folder, tmp_path / "into")


def test_a_manifest_that_is_altered_every_time_is_not_committed(store, folder, rule, tmp_path):
    altered = rule("PUT", r"manifest\.json", "flip-request", times=99)
    with pytest.raises(StoreError, match="nothing is committed"):
        store.commit(PLACE, folder, sheet())
    assert altered.hits > 1
    assert store.read_manifest(PLACE) is None
    altered.times = 0
    store.commit(PLACE, folder, sheet())
    check_whole(store, folder, tmp_path / "into")


def test_checksums_go_with_what_is_written(store, folder, proxy):
    sent = []
    forward = proxy.forward
    proxy.forward = lambda method, path, headers, body: (
        sent.append((method, path, {name.lower() for name in headers})),
        forward(method, path, headers, body),
    )[1]
    store.commit(PLACE, folder, sheet())
    store.put_bytes("x", b"1")
    puts = [headers for method, _, headers in sent if method == "PUT"]
    assert len(puts) == 3
    assert all("content-md5" in headers for headers in puts)


@pytest.mark.parametrize("act", ["lose", "drop", "busy"])
def test_a_put_without_an_answer_is_repeated(store, folder, rule, tmp_path, act):
    for name in (r"manifest\.json", r"weights\.bin"):
        rule("PUT", name, act)
    made = store.commit(PLACE, folder, sheet())
    assert made.files[0].stored_as is None
    check_whole(store, folder, tmp_path / "into")


@pytest.mark.parametrize("act", ["short", "cut", "missing", "flip-answer", "busy"])
@pytest.mark.parametrize("what", [r"weights\.bin", r"manifest\.json"])
def test_one_bad_answer_is_asked_again(store, folder, rule, tmp_path, act, what):
    store.commit(PLACE, folder, sheet())
    for method in ("GET", "HEAD") if act in ("missing", "busy") else ("GET",):
        rule(method, what, act)
    check_whole(store, folder, tmp_path / "into")
    again = rule("GET", what, act)
    assert store.read_file(PLACE, "weights.bin") == (folder / "weights.bin").read_bytes()
    assert again.hits == 1


@pytest.mark.parametrize("act", ["short", "missing"])
@pytest.mark.parametrize("what", [r"weights\.bin", r"manifest\.json"])
def test_a_way_that_stays_bad_never_advises_to_delete(store, folder, rule, tmp_path, act, what):
    """The listing says that the object is there and whole: the answers are wrong, not the product."""
    store.commit(PLACE, folder, sheet())
    rule("GET|HEAD", what, act, times=99)
    with pytest.raises(StoreError) as fetched:
        store.fetch(PLACE, tmp_path / "into")
    with pytest.raises(StoreError) as read:
        store.read_file(PLACE, "weights.bin")
    for error in (fetched.value, read.value):
        assert not isinstance(error, CorruptArtifact)
        assert ADVICE not in str(error)
        assert "delete nothing" in str(error)
        assert "\n" not in str(error)


def test_a_listing_that_forgets_is_asked_again(store, folder, monkeypatch):
    made = store.commit(PLACE, folder, sheet())
    listings = [{}, store.sizes(PLACE)]
    with monkeypatch.context() as patch:
        patch.setattr(store, "sizes", lambda prefix: listings.pop(0))
        store.verify(PLACE, made)
        assert not listings
        listings += [{}] * 2
        with pytest.raises(CorruptArtifact, match=f"missing.*{ADVICE}"):
            store.verify(PLACE, made)


def test_the_same_wrong_content_twice_is_damage(store, folder, tmp_path, direct):
    store.commit(PLACE, folder, sheet())
    place = {"Bucket": "art", "Key": store._full(f"{PLACE}/weights.bin")}
    direct.put_object(**place, Body=b"?" * 12800)
    with pytest.raises(CorruptArtifact, match=f"altered.*{ADVICE}"):
        store.fetch(PLACE, tmp_path / "into")
    direct.delete_object(**place)
    with pytest.raises(CorruptArtifact, match=f"missing.*{ADVICE}"):
        store.read_file(PLACE, "weights.bin")
    assert list((tmp_path / "into").iterdir()) == []


def test_a_late_upload_of_an_unfinished_attempt(store, folder, tmp_path, direct, monkeypatch):
    """Two writers in turns: one file of the first arrives before the second's, one after the second's commit. What lies
    under the product's names is what was committed, for whoever copies the place without its manifest."""
    (folder / "config.json").write_text("{}")
    older = tmp_path / "older"
    older.mkdir()
    (older / "weights.bin").write_bytes(b"older" * 3000)
    (older / "config.json").write_text('{"older": true}')
    send = store._send

    def stops(key, path, seal):
        if key.endswith("weights.bin"):
            send(key, path, seal)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_send", stops)
        with pytest.raises(KeyboardInterrupt):
            store.commit(PLACE, older, sheet("d1"))
    assert store.get_bytes(f"{PLACE}/weights.bin") == b"older" * 3000
    made = store.commit(PLACE, folder, sheet("d2"))
    assert [entry.stored_as is None for entry in made.files] == [True, False]

    for name in ("config.json", "weights.bin"):  # the first goes on where it was
        send(f"{PLACE}/{name}", older / name, seal_file(older / name, 16 << 20))
    with pytest.raises(CommitConflict):
        store.commit(PLACE, older, sheet("d1"))
    for entry in made.files:
        body = direct.get_object(Bucket="art", Key=store._full(f"{PLACE}/{entry.path}"))["Body"].read()
        assert hashlib.sha256(body).hexdigest() == entry.sha256, entry.path
    check_whole(store, folder, tmp_path / "into")


def test_a_commit_that_died_before_it_settled_is_settled_later(store, folder, tmp_path, monkeypatch):
    store.put_bytes(f"{PLACE}/weights.bin", b"older")
    with monkeypatch.context() as patch:
        patch.setattr(store, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.commit(PLACE, folder, sheet())
    made = store.read_manifest(PLACE)
    assert store.get_bytes(f"{PLACE}/weights.bin") == b"older"
    store.settle(PLACE, made)
    assert store.get_bytes(f"{PLACE}/weights.bin") == (folder / "weights.bin").read_bytes()
    monkeypatch.setattr(store, "_read_back", lambda key: pytest.fail("read again what its copying noted"))
    store.settle(PLACE, made)


def test_where_the_server_cannot_copy_the_name_is_left_empty(store, folder, caplog, monkeypatch):
    store.put_bytes(f"{PLACE}/weights.bin", b"older")

    def refuse(**_):
        raise KeyError("CopyPartResult")

    monkeypatch.setattr(store._client, "copy_object", refuse)
    with caplog.at_level(logging.WARNING):
        made = store.commit(PLACE, folder, sheet())
    assert store.get_bytes(f"{PLACE}/weights.bin") is None
    assert "cannot be copied" in caplog.text
    assert store.read_file(PLACE, "weights.bin") == (folder / "weights.bin").read_bytes()
    store.verify(PLACE, made)


def test_an_interrupted_download_leaves_nothing_to_be_read(store, folder, rule, tmp_path):
    store.commit(PLACE, folder, sheet())
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "weights.bin.a1b2C3d4").write_bytes(b"half")
    check_whole(store, folder, tmp_path / "into")
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["weights.bin"]
