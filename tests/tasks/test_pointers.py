"""What a run points at: moved by the holder of its lease alone, with its history, over every kind of store."""

import logging

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.locks import lease
from radlads.tasks.contracts.locks.lease import LeaseLost, run_lease
from radlads.tasks.contracts.store.layout import check_layout, claim_layout, former_keys, product_key, run_names
from radlads.tasks.contracts.store.open import StoreError
from radlads.tasks.contracts.store.pointers import point, pointer_key, read_pointer, read_pointers

from .test_lease import elsewhere


@pytest.fixture
def held(store, tmp_path, monkeypatch):
    """The lease on the run `r`, without a heartbeat of its own."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 1000)
    with run_lease(store, "r", tmp_path) as mine:
        yield mine


def test_a_pointer_moves_and_keeps_its_history(store, held):
    assert read_pointer(store, "r", "align") is None
    for digest in ("d1", "d2", "d3", "d1", "d1"):
        point(store, "r", "align", "align", digest, held)
    found = read_pointer(store, "r", "align")
    assert [target.digest for target in found.targets] == ["d1", "d3", "d2"], "newest first, each once"
    assert found.key == product_key("align", "d1")
    assert found.uri == f"{store.uri}/products/align/d1"
    assert found.token == held.ref.token
    times = [target.time for target in found.targets]
    assert times == sorted(times, reverse=True)


def test_what_stays_the_same_is_not_written_again(store, held, monkeypatch):
    first = point(store, "r", "align", "align", "d1", held)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "replace", lambda *_: pytest.fail("written"))
        assert point(store, "r", "align", "align", "d1", held) == first


def test_all_pointers_of_a_run_and_of_no_other(store, held, tmp_path):
    point(store, "r", "align", "align", "d1", held)
    point(store, "r", "tokenize-train", "tokenize", "d2", held)
    with run_lease(store, "r2", tmp_path) as other:
        point(store, "r2", "align", "align", "d9", other)
    assert {label: pointer.digest for label, pointer in read_pointers(store, "r").items()} == {
        "align": "d1", "tokenize-train": "d2"
    }  # fmt: skip
    assert read_pointers(store, "r2")["align"].digest == "d9"
    assert run_names(store) == ["r", "r2"]


def test_who_lost_the_run_moves_no_pointer(store, held):
    point(store, "r", "align", "align", "d1", held)
    elsewhere(store, token=held.ref.token + 1)
    with pytest.raises(LeaseLost):
        point(store, "r", "align", "align", "d2", held)
    assert read_pointer(store, "r", "align").digest == "d1"


def test_a_pointer_of_a_later_holder_is_not_moved_back(store, held):
    """The lease file alone might say nothing: somebody removed it and the token began anew."""
    later = point(store, "r", "align", "align", "d1", held).model_copy(update={"token": held.ref.token + 3})
    store.put_bytes(pointer_key("r", "align"), later.model_dump_json().encode())
    with pytest.raises(LeaseLost, match="another process"):
        point(store, "r", "align", "align", "d2", held)
    assert read_pointer(store, "r", "align").digest == "d1"


def test_a_write_between_look_and_write_is_seen(store, held, monkeypatch):
    """Of two writers on condition one is refused, looks again and keeps the other's in the history."""
    point(store, "r", "align", "align", "d1", held)
    real, raced = type(store).replace, []

    def race(self, key, data, version):
        if not raced:
            raced.append(1)
            other = read_pointer(store, "r", "align").model_copy(update={"digest": "d2"})
            store.put_bytes(key, other.model_dump_json().encode())
        return real(self, key, data, version)

    monkeypatch.setattr(type(store), "replace", race)
    point(store, "r", "align", "align", "d3", held)
    assert [target.digest for target in read_pointer(store, "r", "align").targets][:2] == ["d3", "d2"]


def test_what_is_no_pointer_is_said_in_one_line(store, held):
    store.put_bytes(pointer_key("r", "align"), b"{")
    with pytest.raises(StoreError, match="is not a pointer") as said:
        read_pointer(store, "r", "align")
    assert "\n" not in str(said.value)


def test_a_store_of_the_layout_before_is_refused_with_the_way(store, caplog):
    with caplog.at_level(logging.WARNING):
        check_layout(store)
        assert store.get_bytes("layout") is None, "looking writes nothing"
        claim_layout(store)
        claim_layout(store)
    assert store.get_bytes("layout") == b"3\n"
    store.delete("layout")
    for key in ("runs/a/recipe.yaml", "runs/a/lease.json", "runs/a/stages/align.json"):
        store.put_bytes(key, b"{}")
    assert former_keys(store) == []
    check_layout(store)
    store.delete("layout")
    store.put_bytes("runs/a/align/job/log.txt", b"")
    with pytest.raises(UserError, match="radlads store upgrade") as said:
        claim_layout(store)
    assert "\n" not in str(said.value)
    assert store.get_bytes("layout") is None
    store.put_bytes("layout", b"4\n")
    with pytest.raises(UserError, match="has layout '4"):
        check_layout(store)
