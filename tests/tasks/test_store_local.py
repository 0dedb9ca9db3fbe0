"""What only a folder has: durability, links, locks that die with their holder."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.open import CorruptArtifact, LocalStore, StoreError, StoreUnusable

from .test_store import sheet


@pytest.fixture
def store(tmp_path):
    return LocalStore(StoreRef(uri=str(tmp_path / "store")))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "product"
    made.mkdir()
    (made / "weights.bin").write_bytes(b"x" * 1000)
    return made


def test_a_filesystem_without_hard_links(store, folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert store.put_if_absent("a", b"1")
    assert not store.put_if_absent("a", b"2")
    assert store.commit("runs/a/align", folder, sheet()) == store.commit("runs/a/align", folder, sheet())


def die_while_committing(uri, folder, entered):
    store = LocalStore(StoreRef(uri=uri))
    real = store._write

    def slow(blocks, target):
        result = real(blocks, target)
        entered.set()
        time.sleep(1000)
        return result

    store._write = slow
    store.commit("runs/a/align", folder, sheet("dead"))


def test_a_writer_killed_in_the_middle_leaves_no_product_and_no_lock(store, folder, tmp_path):
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    writer = context.Process(target=die_while_committing, args=(store.uri, folder, entered))
    writer.start()
    assert entered.wait(30)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert store.read_manifest("runs/a/align") is None
    assert store.list("runs/a/align") == ["runs/a/align/weights.bin"]
    assert store.commit("runs/a/align", folder, sheet("alive")).digest == "alive"


def test_leftovers_are_not_listed_and_tidied(store, folder, tmp_path):
    leftover = tmp_path / "store" / "runs" / "a" / "align" / ".tmp-dead"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half")
    assert store.list("runs/a") == []
    store.commit("runs/a/align", folder, sheet())
    assert not leftover.exists()


def test_an_altered_file_is_found_even_if_it_was_read_before(store, folder, tmp_path):
    store.commit("runs/a/align", folder, sheet())
    store.fetch("runs/a/align", tmp_path / "into")
    (tmp_path / "store" / "runs" / "a" / "align" / "weights.bin").write_bytes(b"y" * 1000)
    with pytest.raises(CorruptArtifact, match="altered"):
        store.fetch("runs/a/align", tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == [], "what failed is not left to be used"


def test_what_is_fetched_are_links_not_copies(store, folder, tmp_path):
    store.commit("runs/a/align", folder, sheet())
    got = store.fetch("runs/a/align", tmp_path / "into")
    assert (got / "weights.bin").samefile(tmp_path / "store/runs/a/align/weights.bin")
    assert store.fetch("runs/a/align", tmp_path / "into") == got


@pytest.mark.parametrize("without", [("link",), ("link", "symlink")])
def test_a_filesystem_without_links_gets_copies(store, folder, tmp_path, monkeypatch, without):
    store.commit("runs/a/align", folder, sheet())

    def refuse(*_):
        raise OSError(errno.EXDEV, "another device")

    for name in without:
        monkeypatch.setattr(os, name, refuse)
    got = store.fetch("runs/a/align", tmp_path / "into") / "weights.bin"
    assert got.read_bytes() == b"x" * 1000
    assert got.is_symlink() == (without == ("link",))


def test_a_file_stored_under_another_name_is_fetched_under_its_own(store, folder, tmp_path):
    """As a bucket copied into a folder looks after two attempts: the file's own name holds the unfinished one's."""
    manifest = store.commit("runs/a/align", folder, sheet())
    entry = manifest.files[0].model_copy(update={"stored_as": f".objects/{manifest.files[0].sha256}"})
    place = tmp_path / "store" / "runs" / "a" / "align"
    (place / ".objects").mkdir()
    (place / "weights.bin").rename(place / entry.stored_as)
    (place / "weights.bin").write_bytes(b"older" * 200)
    store.put_bytes(
        "runs/a/align/manifest.json", manifest.model_copy(update={"files": (entry,)}).model_dump_json().encode()
    )
    got = store.fetch("runs/a/align", tmp_path / "into")
    assert (got / "weights.bin").read_bytes() == b"x" * 1000
    assert [path.name for path in got.iterdir()] == ["weights.bin"]


@pytest.mark.parametrize("inner", ["weights.bin", "."])
def test_a_link_out_of_the_store_is_not_followed(store, folder, tmp_path, inner):
    store.commit("runs/a/align", folder, sheet())
    place = tmp_path / "store" / "runs" / "a" / "align" / inner
    outside = tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    with pytest.raises(StoreUnusable, match="leads out of the store"):
        store.fetch("runs/a/align", tmp_path / "into")
    with pytest.raises(StoreUnusable, match="leads out of the store"):
        store.put_bytes("runs/a/align/weights.bin/x" if inner == "weights.bin" else "runs/a/align/x", b"")


def test_deleting_a_link_leaves_what_it_links_to(store, folder, tmp_path):
    store.commit("runs/a/align", folder, sheet())
    place = tmp_path / "store" / "runs" / "a" / "align" / "weights.bin"
    place.rename(tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    store.delete("runs/a/align")
    assert (tmp_path / "outside").read_bytes() == b"x" * 1000
    assert not place.parent.exists()


def test_a_fetch_does_not_clear_the_store(store, folder, tmp_path):
    store.commit("runs/a/align", folder, sheet())
    for into in (tmp_path, tmp_path / "store", tmp_path / "store" / "runs"):
        with pytest.raises(StoreError, match="contain one another"):
            store.fetch("runs/a/align", into)
    assert store.fetch("runs/a/align", tmp_path / "into")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left on the device; free some"), (errno.EROFS, "the file system is read-only; choose")],
)
def test_errors_of_the_filesystem_are_one_line(store, folder, monkeypatch, number, words):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreUnusable, match=words):
        store.commit("runs/a/align", folder, sheet())


def test_clearing_up_after_a_commit_leaves_a_lease_that_is_being_written(store, folder, monkeypatch):
    """The heartbeat of the maker writes beside the product while the job commits it."""
    real = store._write_beside

    def commits_meanwhile(target, data):
        temporary = real(target, data)
        if target.name == "lease.json":
            store._tidy("products/align/d1")
        return temporary

    store.put_bytes("products/align/d1/x", b"1")
    monkeypatch.setattr(store, "_write_beside", commits_meanwhile)
    store.put_bytes("products/align/d1/lease.json", b"{}")
    assert store.get_bytes("products/align/d1/lease.json") == b"{}"
