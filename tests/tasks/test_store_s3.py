"""What only S3 has: multipart uploads and what is left of them, endpoints without conditions, errors in one line."""

import hashlib
import logging
import uuid

import pytest
from botocore.exceptions import ClientError

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.open import CorruptArtifact, StoreError, StoreUnusable
from radlads.tasks.contracts.store.s3 import objects as s3_objects
from radlads.tasks.contracts.store.s3 import store as s3_store
from radlads.tasks.contracts.store.s3.seal import part_size, seal_file
from radlads.tasks.contracts.store.s3.store import S3Store

from .test_store import sheet

MIB = 1 << 20


@pytest.fixture
def store(s3_endpoint):
    return S3Store(StoreRef(uri=f"s3://art/{uuid.uuid4().hex}", endpoint_url=s3_endpoint), part_bytes=5 * MIB)


@pytest.fixture
def big(tmp_path):
    """Twelve MiB: three parts of five, the last one short."""
    made = tmp_path / "big"
    made.mkdir()
    (made / "weights.bin").write_bytes(bytes(range(256)) * (12 * MIB // 256) + b"tail")
    return made


def uploads(store):
    return store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=store._root).get("Uploads", [])


def test_multipart_round_trip(store, big, tmp_path):
    store.commit("runs/a/align", big, sheet())
    got = store.fetch("runs/a/align", tmp_path / "into")
    assert (got / "weights.bin").read_bytes() == (big / "weights.bin").read_bytes()
    assert uploads(store) == []


def test_multipart_from_memory(store, big, tmp_path):
    data = (big / "weights.bin").read_bytes()
    entry = store.put_blocks("runs/a/step/weights.bin", [data[:7], memoryview(data)[7:]])
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert uploads(store) == []
    store.adopt("runs/a/step", sheet(files=(entry.model_copy(update={"path": "weights.bin"}),)))
    assert store.read_file("runs/a/step", "weights.bin") == data


@pytest.mark.parametrize("size", [100, 12 * MIB])
@pytest.mark.parametrize("times", [1, 2])
def test_an_upload_from_memory_that_arrives_altered_is_sent_once_more(moto_endpoint, monkeypatch, size, times):
    store = S3Store(StoreRef(uri=f"s3://art/{uuid.uuid4().hex}", endpoint_url=moto_endpoint), part_bytes=5 * MIB)
    real, left = store._holds, [False] * times

    def holds(key, seal):
        return left.pop() if left else real(key, seal)

    monkeypatch.setattr(store, "_holds", holds)
    if times == 2:
        with pytest.raises(CorruptArtifact, match="does not match its source"):
            store.put_blocks("weights.bin", [bytes(size)])
    else:
        assert store.put_blocks("weights.bin", [bytes(size)]).size == size


def test_an_upload_from_memory_that_fails_is_aborted(moto_endpoint, monkeypatch):
    store = S3Store(StoreRef(uri=f"s3://art/{uuid.uuid4().hex}", endpoint_url=moto_endpoint), part_bytes=5 * MIB)
    real = store._client.upload_part

    def failing(**given):
        if given["PartNumber"] == 2:
            raise ClientError({"Error": {"Code": "SlowDown", "Message": "later"}}, "UploadPart")
        return real(**given)

    monkeypatch.setattr(store._client, "upload_part", failing)
    with pytest.raises(StoreError, match="SlowDown"):
        store.put_blocks("weights.bin", [bytes(12 * MIB)])
    assert uploads(store) == []
    assert store.list("weights.bin") == []


def test_a_large_file_is_read_once(moto_endpoint, big, monkeypatch):
    store = S3Store(StoreRef(uri=f"s3://art/{uuid.uuid4().hex}", endpoint_url=moto_endpoint), part_bytes=5 * MIB)
    monkeypatch.setattr(s3_store, "seal_file", lambda *_: pytest.fail("read once more"))
    manifest = store.commit("runs/a/align", big, sheet())
    monkeypatch.undo()
    assert manifest.files[0].sha256 == hashlib.sha256((big / "weights.bin").read_bytes()).hexdigest()
    assert store.read_file("runs/a/align", "weights.bin") == (big / "weights.bin").read_bytes()


def test_what_is_already_here_is_not_downloaded_again(store, big, tmp_path, monkeypatch):
    (big / "small").write_text("1")
    store.commit("runs/a/align", big, sheet())
    into = store.fetch("runs/a/align", tmp_path / "into")
    (into / "small").write_text("2")
    asked = []
    real = store._client.download_file
    monkeypatch.setattr(store._client, "download_file", lambda *a, **k: (asked.append(a[1]), real(*a, **k)))
    store.fetch("runs/a/align", into)
    assert [key.rsplit("/", 1)[-1] for key in asked] == ["small"]
    assert (into / "small").read_text() == "1"


def test_abandoned_uploads_are_aborted(store, big):
    place = {"Bucket": store.bucket, "Key": store._full("runs/a/align/checkpoints/step-1/optim.bin")}
    upload = store._client.create_multipart_upload(**place)["UploadId"]
    store._client.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"x" * 5 * MIB)
    other = {"Bucket": store.bucket, "Key": store._full("runs/b/align/weights.bin")}
    kept = store._client.create_multipart_upload(**other)["UploadId"]
    store.commit("runs/a/align", big, sheet())
    assert [item["UploadId"] for item in uploads(store)] == [kept]
    store.delete("runs/b")
    assert uploads(store) == []


def test_an_interrupted_commit_goes_on_with_what_arrived(store, big, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "put_if_absent", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.commit("runs/a/align", big, sheet())
    monkeypatch.setattr(store, "_send", lambda *_: pytest.fail("uploaded again"))
    assert store.commit("runs/a/align", big, sheet()).files[0].stored_as is None


def test_a_slow_writer_does_not_overwrite(store, big, monkeypatch):
    """Another attempt's object appears at the path while ours is on its way: ours goes elsewhere."""
    real = store._send
    theirs = b"theirs" * 1000

    def race(key, path, seal):
        if not key.startswith("runs/a/align/.objects"):
            store.put_bytes(key, theirs)
        real(key, path, seal)

    sealing = store._send_sealing

    def race_sealing(key, path, part):
        store.put_bytes(key, theirs)
        return sealing(key, path, part)

    monkeypatch.setattr(store, "_send", race)
    monkeypatch.setattr(store, "_send_sealing", race_sealing)
    (big / "small").write_text("ours")
    if not store.probe()["conditional_put"]:
        (big / "small").unlink()  # a plain put on such an endpoint has no guard; the warning says so
    manifest = store.commit("runs/a/align", big, sheet())
    assert all(entry.stored_as == f".objects/{entry.sha256}" for entry in manifest.files)
    ours = (big / "weights.bin").read_bytes()
    assert store.get_bytes("runs/a/align/weights.bin") == ours, "what `aws s3 sync` takes is what was committed"
    assert store.read_file("runs/a/align", "weights.bin") == ours


def test_garbled_upload_is_found_by_reading_back(store, big, monkeypatch):
    def garble(key, path, seal):
        store.put_bytes(key, b"?" * seal.size)

    def garble_sealing(key, path, part):
        store.put_bytes(key, b"?" * path.stat().st_size)
        return seal_file(path, part)

    monkeypatch.setattr(store, "_send", garble)
    monkeypatch.setattr(store, "_send_sealing", garble_sealing)
    with pytest.raises(CorruptArtifact, match="does not match its source"):
        store.commit("runs/a/align", big, sheet())
    assert store.read_manifest("runs/a/align") is None


def test_unproven_etags_are_read_back(store, big, monkeypatch):
    """Encrypted buckets give ETags that are no MD5."""
    asked = []
    real_head, real_read = store._head, store._read_back
    monkeypatch.setattr(store, "_head", lambda full: (h := real_head(full)) and {**h, "ETag": '"opaque"'})
    monkeypatch.setattr(store, "_read_back", lambda key: (asked.append(key), real_read(key))[1])
    store.commit("runs/a/align", big, sheet())
    assert len(asked) == 1


def test_endpoint_without_conditions_warns_once(rclone_endpoint, caplog, monkeypatch):
    monkeypatch.setattr(s3_objects, "_probed", {})
    ref = StoreRef(uri="s3://art/warned", endpoint_url=rclone_endpoint)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert S3Store(ref).probe() == {
                "uri": "s3://art/warned", "conditional_put": False, "conditional_replace": False,
                "conditional_multipart": False, "bare_etags": False,
            }  # fmt: skip
    assert len([r for r in caplog.records if "ignores conditional writes" in r.message]) == 1


def test_probe_of_servers_that_honour_conditions(moto_endpoint):
    assert S3Store(StoreRef(uri="s3://art/probe", endpoint_url=moto_endpoint)).probe() == {
        "uri": "s3://art/probe", "conditional_put": True, "conditional_replace": True, "conditional_multipart": True,
        "bare_etags": False,
    }  # fmt: skip


def test_probe_of_a_server_that_knows_etags_without_quotes_only(ceph_endpoint):
    able = S3Store(StoreRef(uri="s3://art/probe", endpoint_url=ceph_endpoint)).probe()
    assert able["conditional_put"]
    assert able["conditional_replace"]


def test_missing_bucket(s3_endpoint):
    store = S3Store(StoreRef(uri="s3://nosuchbucket", endpoint_url=s3_endpoint))
    with pytest.raises(StoreUnusable, match="bucket 'nosuchbucket' does not exist"):
        store.put_bytes("x", b"1")


def test_bad_credentials(ceph_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    store = S3Store(StoreRef(uri="s3://art", endpoint_url=ceph_endpoint))
    with pytest.raises(StoreUnusable, match="refuses these credentials"):
        store.get_bytes("x")


def test_unreachable_endpoint(s3_credentials, monkeypatch):
    store = S3Store(StoreRef(uri="s3://art", endpoint_url="http://127.0.0.1:9"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StoreError, match="Could not connect"):
        store.get_bytes("x")


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 5 * MIB + 1, 10 * MIB])
def test_seal_knows_the_multipart_etag(moto_endpoint, tmp_path, size):
    store = S3Store(StoreRef(uri=f"s3://art/{uuid.uuid4().hex}", endpoint_url=moto_endpoint), part_bytes=5 * MIB)
    path = tmp_path / "file"
    path.write_bytes(b"a" * size)
    store.put_file("file", path)
    found = store._head("file")["ETag"].strip('"')
    assert found in seal_file(path, 5 * MIB).etags


def test_part_size_stays_within_ten_thousand_parts():
    for size in (0, 1, MIB, 16 << 30, 1 << 40, 5 << 40):
        part = part_size(size, 16 * MIB)
        assert part % MIB == 0
        assert part >= 16 * MIB
        assert size <= part * 10_000
