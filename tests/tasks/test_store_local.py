"""What only a folder has: durability, links, locks that die with their holder."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from radlads.tasks.job import StoreRef
from radlads.tasks.store import LocalStore

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
    real = store._copy

    def slow(source, target):
        result = real(source, target)
        entered.set()
        time.sleep(1000)
        return result

    store._copy = slow
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
    path = store.fetch("runs/a/align", tmp_path / "unused") / "weights.bin"
    assert path.parent == tmp_path / "store" / "runs" / "a" / "align", "a folder is read where it is"
    path.write_bytes(b"y" * 1000)
    with pytest.raises(Exception, match="altered"):
        store.fetch("runs/a/align", tmp_path / "unused")
