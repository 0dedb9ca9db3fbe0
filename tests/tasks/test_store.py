"""The same tests for every kind of store: a folder, a mock S3, and real S3 servers where they are installed."""

import threading
from datetime import UTC, datetime

import pytest

from radlads.tasks.contracts.job import CodeVersion, Manifest, StoreRef
from radlads.tasks.contracts.store.open import CommitConflict, CorruptArtifact, StoreError, StoreUnusable, open_store


def sheet(digest="d1", **changes):
    return Manifest(
        stage="align",
        digest=digest,
        spec={},
        files=(),
        code=CodeVersion(sha=None, versions={}),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    ).model_copy(update=changes)


@pytest.fixture
def folder(tmp_path):
    """A small product: nested, one empty file."""
    made = tmp_path / "product"
    (made / "model").mkdir(parents=True)
    (made / "model" / "config.json").write_text("{}")
    (made / "model" / "weights.bin").write_bytes(bytes(range(256)) * 50)
    (made / "empty").write_bytes(b"")
    (made / "with space & ü.txt").write_text("x")
    return made


def spoil(store, key, data):
    """Alter an object behind the store's back."""
    store.put_bytes(key, data)


def test_commit_then_fetch(store, folder, tmp_path):
    manifest = store.commit("runs/a/align", folder, sheet(metrics={"loss": 1.5}))
    assert {entry.path for entry in manifest.files} == {
        "model/config.json", "model/weights.bin", "empty", "with space & ü.txt"
    }  # fmt: skip
    assert store.read_manifest("runs/a/align") == manifest
    store.verify("runs/a/align", manifest)
    got = store.fetch("runs/a/align", tmp_path / "into")
    for entry in manifest.files:
        assert (got / entry.path).read_bytes() == (folder / entry.path).read_bytes()
    assert store.read_file("runs/a/align", "model/config.json") == b"{}"


def test_adopted_from_memory(store, tmp_path):
    blocks = [b"head", memoryview(bytes(range(256)) * 5000), b""]
    entries = [store.put_blocks("runs/a/step/parts.bin", blocks), store.put_blocks("runs/a/step/none", [b""])]
    files = tuple(entry.model_copy(update={"path": entry.path.rsplit("/", 1)[1]}) for entry in entries)
    manifest = sheet(files=files)

    def refuse():
        raise StoreError("another process")

    with pytest.raises(StoreError, match="another process"):
        store.adopt("runs/a/step", manifest, guard=refuse)
    assert store.read_manifest("runs/a/step") is None
    store.adopt("runs/a/step", manifest)
    got = store.fetch("runs/a/step", tmp_path / "into")
    assert (got / "parts.bin").read_bytes() == b"".join(blocks)
    assert (got / "none").read_bytes() == b""
    lost = sheet("d2", files=(*files, files[0].model_copy(update={"path": "lost"})))
    with pytest.raises(CorruptArtifact, match="lost is missing"):
        store.adopt("runs/a/step", lost)


def test_fetch_subset(store, folder, tmp_path):
    store.commit("runs/a/align", folder, sheet())
    got = store.fetch("runs/a/align", tmp_path / "into", subset="model")
    assert (got / "model" / "config.json").is_file()
    with pytest.raises(StoreError, match="no 'mod'"):
        store.fetch("runs/a/align", tmp_path / "other", subset="mod")


def test_what_is_fetched_is_what_is_listed_and_nothing_else(store, folder, tmp_path):
    manifest = store.commit("runs/a/align", folder, sheet())
    store.put_bytes("runs/a/align/model/modeling_extra.py", b"not of the product")
    store.put_bytes("runs/a/align/job/log.txt", b"papers")
    into, outside = tmp_path / "into", tmp_path / "outside"
    (into / "model" / "weights.bin").mkdir(parents=True)
    (into / "model" / "adapter.json").write_text("left by somebody")
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (into / "link").symlink_to(outside)
    for _ in range(2):
        got = store.fetch("runs/a/align", into)
        found = {path.relative_to(got).as_posix() for path in got.rglob("*") if not path.is_dir()}
        assert found == {entry.path for entry in manifest.files}
    store.fetch("runs/a/align", into, subset="model")
    assert sorted(path.name for path in into.rglob("*")) == ["config.json", "model", "weights.bin"]
    assert (outside / "kept").exists()


def test_replace_takes_the_version_that_was_read(store):
    assert not store.replace("runs/a/lease", b"0", "none")
    store.put_bytes("runs/a/lease", b"1")
    data, version = store.read("runs/a/lease")
    assert store.replace("runs/a/lease", data + b"2", version)
    assert store.replace("runs/a/lease", b"12", version), "an answer was lost: what is there is what was asked for"
    assert not store.replace("runs/a/lease", b"3", version)
    assert store.get_bytes("runs/a/lease") == b"12"


def test_age_is_told_by_the_stores_own_clock(store):
    assert store.age("runs/a/x") is None
    store.put_bytes("runs/a/x", b"1")
    assert 0 <= store.age("runs/a/x") < 30


def test_nothing_there(store, tmp_path):
    assert store.read_manifest("runs/none/align") is None
    assert store.get_bytes("runs/none") is None
    assert store.list("runs/none") == []
    with pytest.raises(StoreError, match="nothing is committed"):
        store.fetch("runs/none/align", tmp_path)
    store.delete("runs/none")


def test_without_its_manifest_a_product_is_not_there(store, folder, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_if_absent", die)
        with pytest.raises(KeyboardInterrupt):
            store.commit("runs/a/align", folder, sheet())
    assert store.read_manifest("runs/a/align") is None
    assert store.commit("runs/a/align", folder, sheet("d2")).digest == "d2"


def test_same_digest_again_is_returned(store, folder):
    first = store.commit("runs/a/align", folder, sheet())
    (folder / "empty").write_text("not so empty")
    assert store.commit("runs/a/align", folder, sheet(created_at=datetime(2027, 1, 1, tzinfo=UTC))) == first


def test_another_digest_is_a_conflict(store, folder, tmp_path):
    store.commit("runs/a/align", folder, sheet("d1"))
    (folder / "empty").write_text("changed")
    with pytest.raises(CommitConflict, match="nothing is overwritten"):
        store.commit("runs/a/align", folder, sheet("d2"))
    assert (store.fetch("runs/a/align", tmp_path / "into") / "empty").read_bytes() == b""


@pytest.mark.parametrize("damage", ["altered", "torn", "missing"])
def test_damage_is_found(store, folder, tmp_path, damage):
    manifest = store.commit("runs/a/align", folder, sheet())
    key = "runs/a/align/model/weights.bin"
    data = store.get_bytes(key)
    if damage == "missing":
        store.delete(key)
    else:
        spoil(store, key, data[:-1] if damage == "torn" else data[:-1] + b"?")
    with pytest.raises(CorruptArtifact, match=r"weights\.bin.*have it made again"):
        store.fetch("runs/a/align", tmp_path / "into")
    with pytest.raises(CorruptArtifact):
        store.read_file("runs/a/align", "model/weights.bin")
    if damage != "altered":
        with pytest.raises(CorruptArtifact):
            store.verify("runs/a/align", manifest)


def test_manifest_of_another_kind_is_corrupt(store):
    store.put_bytes("runs/a/align/manifest.json", b'{"stage": 1}')
    with pytest.raises(CorruptArtifact, match="not a manifest"):
        store.read_manifest("runs/a/align")


def test_concurrent_commits_one_wins_and_is_whole(store, tmp_path):
    """Different contents under one path at once: whoever wins can be read back whole."""
    writers = 4
    folders = []
    for number in range(writers):
        made = tmp_path / f"w{number}"
        made.mkdir()
        (made / "weights.bin").write_bytes(bytes([number]) * 3000)
        folders.append(made)
    barrier = threading.Barrier(writers)
    results = [None] * writers

    def write(number):
        barrier.wait()
        try:
            results[number] = store.commit("runs/a/align", folders[number], sheet(f"d{number}"))
        except CommitConflict as error:
            results[number] = error

    threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [n for n, result in enumerate(results) if isinstance(result, Manifest)]
    if not store.probe()["conditional_put"]:
        pytest.skip("this endpoint ignores conditional writes: concurrent commits are not protected, and it says so")
    assert len(winners) == 1, results
    got = store.fetch("runs/a/align", tmp_path / "into")
    entry = store.read_manifest("runs/a/align").files[0]
    assert store.read_file("runs/a/align", entry.path) == bytes([winners[0]]) * 3000
    assert got.is_dir()


def test_files_of_an_unfinished_attempt_are_not_in_the_way(store, folder, tmp_path):
    store.put_bytes("runs/a/align/model/weights.bin", b"half of an older attempt")
    store.commit("runs/a/align", folder, sheet())
    got = store.fetch("runs/a/align", tmp_path / "into")
    assert (got / "model/weights.bin").read_bytes() == (folder / "model/weights.bin").read_bytes()


def test_checkpoint_inside_a_stage(store, folder, tmp_path):
    store.commit("runs/a/align/checkpoints/step-000500", folder, sheet("c500"))
    assert store.read_manifest("runs/a/align") is None
    store.delete("runs/a/align/checkpoints/step-000500")
    assert store.list("runs/a/align") == []


def test_prefixes_are_whole_names(store):
    store.put_bytes("runs/a/x", b"1")
    store.put_bytes("runs/ab/x", b"22")
    assert store.list("runs/a") == ["runs/a/x"]
    assert store.sizes("runs/ab") == {"runs/ab/x": 2}
    store.delete("runs/a")
    assert store.list("runs/ab") == ["runs/ab/x"]


def test_uris(store):
    uri = store.join("runs", "a", "align")
    assert uri == f"{store.uri}/runs/a/align"
    assert store.key(uri) == "runs/a/align"
    with pytest.raises(StoreError, match="not in the store"):
        store.key("s3://elsewhere/runs/a")


@pytest.mark.parametrize("key", ["", "/abs", "a/../b", "..", "a//b", "a/./b", "a\\b", "a\nb", "x" * 1000])
def test_bad_keys(store, key):
    with pytest.raises(StoreError, match="not a valid key"):
        store.put_bytes(key, b"")
    with pytest.raises(StoreError, match="not a valid key"):
        store.delete(key)


def test_nan_is_refused(store, folder):
    with pytest.raises(StoreError, match="NaN"):
        store.commit("runs/a/align", folder, sheet(metrics={"loss": float("nan")}))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["A.txt", "a.txt"], "a filesystem that ignores case"),
        (["x/.tmp-1"], "reserved for the store"),
        ([".objects/x"], "reserved for the store"),
        (["manifest.json"], "reserved for the store"),
        (["a\\b"], "not a valid key"),
    ],
)
def test_names_that_no_store_keeps_apart_are_refused_before_anything_is_sent(store, tmp_path, names, words):
    for name in names:
        (tmp_path / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "odd" / name).write_text(name)
    with pytest.raises(StoreError, match=words):
        store.commit("runs/a/align", tmp_path / "odd", sheet())
    assert store.list("runs/a/align") == []


def test_a_folder_that_is_a_link_is_not_left_out_in_silence(store, folder, tmp_path):
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="link to a folder"):
        store.commit("runs/a/align", folder, sheet())


def test_a_guard_that_objects_keeps_the_product_from_being_committed(store, folder):
    asked = []

    def guard():
        asked.append(1)
        if len(asked) == 2:
            raise StoreUnusable("somebody else makes this now")

    with pytest.raises(StoreUnusable):
        store.commit("runs/a/align", folder, sheet(), guard=guard)
    assert store.read_manifest("runs/a/align") is None
    assert store.commit("runs/a/align", folder, sheet(), guard=lambda: None).files


def test_many_files(store, tmp_path):
    made = tmp_path / "many"
    made.mkdir()
    for number in range(60):
        (made / f"{number:03d}").write_text(str(number))
    assert len(store.commit("datasets/x", made, sheet()).files) == 60
    assert len(store.list("datasets/x")) == 61


def test_put_if_absent(store):
    assert store.put_if_absent("runs/a/claim", b"1")
    assert not store.put_if_absent("runs/a/claim", b"2")
    assert store.get_bytes("runs/a/claim") == b"1"


def test_not_a_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable, match="not a folder"):
        open_store(StoreRef(uri=str(tmp_path / "file")))
    with pytest.raises(StoreUnusable, match="neither"):
        open_store(StoreRef(uri="gs://bucket/x"))
    with pytest.raises(StoreUnusable, match="names no bucket"):
        open_store(StoreRef(uri="s3:///x"))
